"""The display of progress, on a terminal and without one; its clock is the test's."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from flexperts.observer import TurnState, current_observer, libraries_drawing, observing
from flexperts.terminal import live
from flexperts.terminal.display import RunDisplay
from flexperts.terminal.live import ProgressDisplay, showing_stages


class Clock:
    """Seconds that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


Made = tuple[Callable[..., ProgressDisplay], io.StringIO, Clock]


@pytest.fixture
def made() -> Made:
    """A function that makes a display without a terminal, what it prints, and its clock."""
    text, clock = io.StringIO(), Clock()
    return (lambda **how: ProgressDisplay(Console(file=text, width=200), clock, **how)), text, clock


def train(client: str, done: int) -> TurnState:
    return TurnState(client, "training", "round 1", done, 8, 2.0, 10 * done)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)


def test_bars_of_a_run_and_of_two_clients_in_turn() -> None:
    console, clock = terminal(), Clock()
    display = ProgressDisplay(console, clock)
    display.phase("training", 3, 1, 2)
    display.turn_ended("zoo")
    for done in (1, 2):
        clock.now += 10
        display.turn(train("bank", done))
        display.turn(train("law [firm]", 2 * done))
    display.follow("fedavg, seed 1", ("fedavg, seed 1, round 2 of 2, training", "1 of 2 clients", 1, 2))
    with console.capture() as shown:
        console.print(display)
    # Bars have 24 places.
    assert [" ".join(line.split()) for line in shown.get().splitlines()] == [
        f"round 1 of 2, training {'━' * 14} 1 of 3 clients, loss 2.000, 5 tokens/s, ETA 0:00:49",
        f"bank: training, round 1 {'━' * 6} 2 of 8 steps, loss 2.000",
        f"law [firm]: training, round 1 {'━' * 12} 4 of 8 steps, loss 2.000",
        f"fedavg, seed 1, round 2 of 2, training {'━' * 12} 1 of 2 clients",
    ]
    display.follow("fedavg, seed 1", None)
    display.turn_ended("bank")
    with console.capture() as shown:
        console.print(display)
    assert [line.split()[0] for line in shown.get().splitlines()] == ["round", "law"]


def test_without_a_terminal_a_line_comes_every_30_seconds(made: Made) -> None:
    make, text, clock = made
    display = make()
    display.phase("training", 3, 1, 2)
    display.turn(train("bank", 4))
    display.turn(train("law", 2))
    for second in range(1, 91):
        clock.now = float(second)
        display.beat()
        if second == 45:
            display.turn_ended("bank")
    first, second_, third = text.getvalue().splitlines()
    turns = "bank: training, round 1: 4 of 8 steps, loss 2.000; law: training, round 1: 2 of 8 steps, loss 2.000"
    assert first == f"  round 1 of 2, training: 0 of 3 clients, loss 2.000, 1 tokens/s, ETA 0:03:30; {turns}"
    assert second_.startswith("  round 1 of 2, training: 1 of 3 clients, loss 2.000, ")
    assert second_.endswith("; law: training, round 1: 2 of 8 steps, loss 2.000")
    assert ", ETA 0:05:42; " in third  # 1.25 of 3 turns took 90 s


def test_runs_in_other_processes_have_a_line_each(made: Made) -> None:
    make, text, clock = made
    display = make()
    display.stage("loading a base")
    display.follow("a", ("a, round 1 of 9, training", "2 of 8 clients", 0, 0))
    display.follow("b", ("b, loading", "0:00:04", 0, 0))
    clock.now = 30
    display.beat()
    assert text.getvalue() == "  a, round 1 of 9, training: 2 of 8 clients\n  b, loading: 0:00:04\n"


def test_a_quiet_command_names_a_stage_that_is_long(made: Made) -> None:
    make, text, clock = made
    display = make(first=5.0)
    display.stage("loading a base")
    for second in range(1, 40):
        clock.now = float(second)
        display.beat()
    assert text.getvalue() == "  loading a base: 0:00:05\n  loading a base: 0:00:35\n"


def test_a_thread_prints_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[Any] = []
    monkeypatch.setattr(ProgressDisplay, "beat", lambda self: (beats.append(self), self._ended.set()))
    with ProgressDisplay(Console(file=io.StringIO())) as display:
        assert display._ended.wait(60)
    assert beats == [display]


def test_short_stages_of_a_quiet_command_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_stages() as display:
        assert current_observer() is display
        display.stage("loading")
    assert capsys.readouterr() == ("", "")


def test_a_display_pauses_while_libraries_draw() -> None:
    console = terminal()
    with ProgressDisplay(console) as display, observing(display):
        ours = sys.stdout
        with libraries_drawing():
            assert display._live is None
            assert sys.stdout is not ours  # rich no longer takes what is printed
            with libraries_drawing():
                assert display._live is None
            assert display._live is None
        assert display._live is not None
        display.libraries_draw(True)
    display.libraries_draw(False)
    assert display._live is None  # the display has ended


def test_a_silo_shows_turns_and_no_stage_that_has_ended() -> None:
    console = terminal()
    display = RunDisplay(console, stages_last=False)
    display.stage("clinic: serving")
    display.turn(train("clinic", 3))
    with console.capture() as shown:
        console.print(display)
    assert [line.split()[0] for line in shown.get().splitlines()] == ["clinic:"]
    display.turn_ended("clinic")
    with console.capture() as shown:
        console.print(display)
    assert not shown.get().strip()


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_draws_bars_only_with_ipywidgets(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    monkeypatch.setattr(live, "find_spec", lambda name: object() if widgets else None)
    shown: list[bool] = []
    monkeypatch.setattr(ProgressDisplay, "_show", lambda self: shown.append(True))
    display = ProgressDisplay(Console(file=io.StringIO(), force_jupyter=True), Clock())
    with display, observing(display), libraries_drawing():
        pass
    assert bool(shown) is widgets
