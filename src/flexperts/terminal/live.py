"""Progress in a terminal or notebook: bars of what is under way; where these cannot be drawn, a line every 30 s."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexperts.observer import Relay, observing
from flexperts.progress import Line, RunProgress
from flexperts.terminal.console import console as terminal

_EVERY = 30.0
"""Seconds between two lines without a terminal."""
_FIRST = 10.0
"""Seconds until the first of them, for commands that print nothing before."""


class ProgressDisplay(Relay):
    """Observer that shows progress, and notices and refusals as lines.

    Args:
        console: Where to; stdout by default.
        clock: Returns seconds.
        first: Seconds until the first line without a terminal.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic, first: float = _EVERY
    ) -> None:
        self._here = RunProgress(clock)
        super().__init__(lambda event, *arguments: getattr(self._here, event)(*arguments))
        self.console = console or terminal()
        self._clock, self._due = clock, clock() + first
        self._elsewhere: dict[str, Line] = {}
        self._live: Live | None = None
        self._drawing = 0
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> Self:
        if self._redraws:
            self._show()
        else:
            self._thread.start()
        return self

    @property
    def _redraws(self) -> bool:
        """Whether lines can be drawn again: in a terminal, and in a notebook with ipywidgets."""
        return self.console.is_interactive or (self.console.is_jupyter and find_spec("ipywidgets") is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._hide()
        if self._thread.is_alive():
            self._thread.join()

    def _show(self) -> None:
        # A new one each time: rich's does not start again where the cursor is.
        self._live = Live(self, console=self.console, transient=True, refresh_per_second=4)
        self._live.start()

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _beats(self) -> None:
        while not self._ended.wait(1):
            self.beat()

    def beat(self) -> None:
        """Print what is under way, if that is due: one line per run."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + _EVERY
        here = "; ".join(str(line).strip() for line in self._here.lines())
        for line in [*([here] if here else []), *list(self._elsewhere.values())]:
            self.console.print(f"  {line}", soft_wrap=True)

    def __rich__(self) -> Table:
        """Return what is under way, with bars."""
        table = Table.grid(padding=(0, 1))
        for line in [*self._here.lines(), *list(self._elsewhere.values())]:
            bar = ProgressBar(total=line.total or None, completed=line.done, width=24)  # without a total, it pulses
            table.add_row(Text(f" {line.text}", no_wrap=True, overflow="ellipsis"), bar, Text(line.facts))
        return table

    def follow(self, run: str, line: tuple[str, str, float, float] | None) -> None:
        """Show where a run in another process is; the stage that led to it has ended."""
        self._elsewhere.pop(run, None)
        if line is not None:
            self._here.stage("")
            self._elsewhere[run] = Line(*line)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, style="bold", soft_wrap=True)

    def notice(self, text: str) -> None:
        """Print a notice."""
        self.console.print(f"  note: {text}", style="yellow", soft_wrap=True)

    def refused(self, client: str, reason: str) -> None:
        """Print a refused client and the reason."""
        self.console.print(f"  {client} refused: {reason}", style="yellow", soft_wrap=True)

    def libraries_draw(self, begin: bool) -> None:
        """Show nothing while libraries draw."""
        self._drawing += 1 if begin else -1
        if self._drawing:
            self._hide()
        elif self._redraws and not self._ended.is_set() and self._live is None:
            self._show()


@contextmanager
def showing_stages() -> Iterator[ProgressDisplay]:
    """Show the stages of the block on stderr: a line that disappears; without a terminal, only long ones."""
    with ProgressDisplay(terminal(stderr=True), first=_FIRST) as display, observing(display):
        yield display
