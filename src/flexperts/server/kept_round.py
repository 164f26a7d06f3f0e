"""A round's result that must not be made twice, on disk from its last update to its end.

Silos give shares for one masked sum of a round only, and a mean that is noised twice tells more than one that is
noised once.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.files import damaged
from flexperts.server.round_log import RoundLog


def keep_round(path: Path, log: RoundLog, result: Tensor, rest: str) -> None:
    """Write a round's result.

    Args:
        path: The file; its name is part of the format.
        log: The round's record so far.
        result: The values.
        rest: What else the round goes on with.
    """
    write_sealed(path, _format(path), {"result": result}, {"kept": rest, "log": vars(log)})


def kept_round(path: Path, number: int) -> tuple[RoundLog, Tensor, str] | None:
    """Return what ``keep_round`` has written of a round; None if there is nothing."""
    if not path.exists():
        return None
    tensors, about = read_sealed(path, _format(path))
    try:
        ((_, result),) = tensors.items()
        log, rest = RoundLog(**about["log"]), str(about["kept"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its content is not valid: {error!r}") from error
    return (log, result, rest) if log.number == number else None


def _format(path: Path) -> str:
    return f"flexperts-{path.stem}-1"
