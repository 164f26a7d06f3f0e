"""Functions that the tests' workers run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from flexperts.errors import DataError
from flexperts.observer import current_observer


def echo(workspace: Any, value: Any) -> Any:
    return value


def after(workspace: Any, signpost: str, value: Any) -> Any:
    """Return when another call has made a file."""
    while not Path(signpost).exists():
        time.sleep(0.01)
    return value


def make(workspace: Any, signpost: str) -> str:
    Path(signpost).touch()
    return signpost


def say(workspace: Any, text: str) -> None:
    current_observer().notice(text)


def refuse(workspace: Any) -> None:
    raise DataError("a row", "it breaks a rule", "fix it")


def fail(workspace: Any) -> None:
    raise ZeroDivisionError("by nought")


def process(workspace: Any) -> int:
    return os.getpid()


def address(workspace: Any) -> int:
    """Return where the base's first weight lies: the same in all forks of one process."""
    return int(next(workspace.base.model.parameters()).data_ptr())


def die(workspace: Any, folder: str, times: int) -> str:
    """Kill the worker in the first calls with this folder."""
    lives = Path(folder)
    if (died := len(list(lives.iterdir()))) < times:
        (lives / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
