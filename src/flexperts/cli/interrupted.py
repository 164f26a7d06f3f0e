"""Work that is stopped, or breaks off: one line that says what is kept, and how to go on."""

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
"""Exit code of a command that was stopped, as shells have it for Ctrl-C."""


@contextmanager
def stoppable(told: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block with one line and exit code 130, without a traceback.

    Args:
        told: Returns the line.
    """
    before = _on_terminate(_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _on_terminate(signal.SIG_IGN)  # a second one must not cut the line
        typer.echo(f"stopped: {told()}", err=True)
        raise typer.Exit(STOPPED) from None
    finally:
        _on_terminate(before)


def command_line(*words: str, options: Sequence[tuple[str, object]] = ()) -> str:
    """Return a `flexperts` command as it is typed.

    Args:
        words: Command and arguments.
        options: Names and values; those without a value are left out, and True stands for a flag.
    """
    given = [(name, value) for name, value in options if value is not None and value is not False]
    parts = [part for name, value in given for part in ([name] if value is True else [name, str(value)])]
    return shlex.join(["flexperts", *words, *parts])


def standing(out: Path, again: str) -> str:
    """Return what a run directory holds, and how to go on with it.

    Args:
        out: The run directory; there may be none yet.
        again: The command that goes on.
    """
    from flexperts.artifacts import RunDirectory

    if not (out / "config.toml").exists():
        return f"nothing is kept; the same command starts anew: {again}"
    run = RunDirectory(out)
    started = [kept for kept in (run, RunDirectory(run.reference)) if (kept.path / "config.toml").exists()]
    rounds = " and ".join(_rounds(kept) for kept in started)
    return f"{rounds} finished, kept in {out}; go on with {again}"


def _rounds(run: Any) -> str:
    import tomllib

    from flexperts.server.checkpoint import saved_round

    settings = tomllib.loads(run.config_toml)
    rounds, method = settings["federation"]["rounds"], settings["method"]["name"]
    return f"{saved_round(run.checkpoint)} of {rounds} rounds of {method}"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _on_terminate(handler: Any) -> Any:
    """Set what SIGTERM does, where that can be set, and return what it did."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
