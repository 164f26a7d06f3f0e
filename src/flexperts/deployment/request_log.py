"""A silo's request log: who asked what, and what came of it, one JSON line for each request, beside the ledger.

No text of a request, a row or an answer is in it. A reply leaves only after its line is on disk.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from flexperts.deployment.state import make_private
from flexperts.errors import ArtifactError, logged
from flexperts.files import json_text, unlinked, unwritable

_LARGEST = 10 * 2**20
"""Bytes after which the next line begins a new file."""
_OLDER = 9
"""How many older files are kept, as requests.jsonl.1 (the newest) and so on."""

Outcome = Literal["answered", "repeated", "refused", "failed"]

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """One request; what is known of it is filled in while it is answered.

    Args:
        user: Id of the caller's user, as the kernel reports it; None where no socket was in between.
        kind: query.join, query.initial, query.keys, train or evaluate; None if it is none of them.
        run: The run's id.
        method: The run's method.
        round: The round that was asked for.
        outcome: answered; repeated, the same reply as before; refused, by a rule; failed, by an error.
        rule: The rule that refused it, as the server is told it, or the type of the error.
        received: Bytes of the request; None if it was too long to be read.
        sent: Bytes of the reply.
        seconds: How long the answer took.
    """

    user: int | None = None
    kind: str | None = None
    run: str | None = None
    method: str | None = None
    round: int | None = None
    outcome: Outcome = "answered"
    rule: str | None = None
    received: int | None = None
    sent: int = 0
    seconds: float = 0.0


class RequestLog:
    """The request log of a state folder, which is made if it does not exist.

    Args:
        state: The state folder.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / "requests.jsonl"
        self.user: int | None = None
        """The user whose request is next."""
        make_private(state)
        self._append(b"")

    def called(self, user: int, may_ask: bool) -> None:
        """Note who calls; one who may not ask is written down at once."""
        self.user = user
        if not may_ask:
            with suppress(ArtifactError):  # it was logged, and nothing is answered
                self.write(Entry(user, outcome="refused", rule="it is not in socket.users"))

    def write(self, entry: Entry) -> None:
        """Write a line to disk.

        Raises:
            ArtifactError: It cannot be written; the error has been logged.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append((json_text({"time": time, **asdict(entry)}) + "\n").encode())

    def _append(self, line: bytes) -> None:
        try:
            if self.path.exists() and self.path.stat().st_size >= _LARGEST:
                self._rotate()
            lines = unlinked(str(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                end = os.fstat(lines).st_size
                if os.write(lines, line) < len(line):  # the disk is full; later lines must not continue this one
                    os.ftruncate(lines, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(lines)
            finally:
                os.close(lines)
        except OSError as error:
            failed = unwritable(self.path, error)
            log.error("%s", logged(failed))
            raise failed from error

    def _rotate(self) -> None:
        for number in range(_OLDER, 1, -1):
            with suppress(FileNotFoundError):
                self._older(number - 1).replace(self._older(number))
        self.path.replace(self._older(1))

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
