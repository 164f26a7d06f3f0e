"""Commands that are stopped or fail midway: one line that says what is kept, and how to resume."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

STOPPED = 130
"""Exit code of a command that was stopped; shells use it for Ctrl-C."""


@contextmanager
def stoppable(told: Callable[[], str]) -> Iterator[None]:
    """End the block on Ctrl-C or SIGTERM with one line and exit code 130, without a traceback.

    Args:
        told: Returns the line to print.
    """
    before = _on_terminate(_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _on_terminate(signal.SIG_IGN)  # a second signal must not cut the line
        typer.echo(f"stopped: {told()}", err=True)
        raise typer.Exit(STOPPED) from None
    finally:
        _on_terminate(before)


def command_line(*words: str, options: Sequence[tuple[str, object]] = ()) -> str:
    """Return a `flexperts` command line that can be pasted into a shell.

    Args:
        words: Command and arguments.
        options: Names and values; an option with None or False is left out, True makes it a flag, and a list
            repeats it.
    """
    line = ["flexperts", *words]
    for name, value in options:
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                line += [name] if one is True else [name, str(one)]
    return shlex.join(line)


def standing(out: Path, again: str) -> str:
    """Return what a run directory holds, and how to resume the run.

    Args:
        out: The run directory; it may not exist yet.
        again: The command that resumes the run.
    """
    from flexperts.artifacts import RunDirectory

    if not (out / "config.toml").exists():
        return f"nothing is kept; this command starts the run again: {again}"
    run = RunDirectory(out)
    started = [kept for kept in (run, RunDirectory(run.reference)) if (kept.path / "config.toml").exists()]
    rounds = " and ".join(_rounds(kept) for kept in started)
    return f"{rounds} finished, kept in {out}; resume with {again}"


def _rounds(run: Any) -> str:
    from flexperts.methods.registry import total_rounds
    from flexperts.recipe import recorded_recipe
    from flexperts.server.checkpoint import saved_round

    recipe = recorded_recipe(run.path)
    rounds = total_rounds(recipe.method, recipe.federation.rounds)
    return f"{saved_round(run.checkpoint)} of {rounds} rounds of {recipe.method.name}"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _on_terminate(handler: Any) -> Any:
    """Set the handler of SIGTERM (in the main thread only), and return the one before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
