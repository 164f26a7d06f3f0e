"""The finished rounds of a run, each read once, however often one looks while a process writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from flexperts.errors import ArtifactError
from flexperts.files import damaged, opened, parsed_json


class FinishedRounds:
    """What is shown of the rounds in ``rounds.jsonl``.

    A process appends a line after every round, and replaces the file by its first lines when it resumes. So the
    last line that was read is compared before newer ones are read; if it has changed, all lines are read again.
    Text after the last line end is a line that is being written.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.silos: dict[str, dict[str, Any]] = {}
        self.changed_at: float | None = None
        self.version: tuple[int, ...] = ()
        """What differs after every change of the file."""
        self._at, self._last = 0, b""
        """Where the last line that was read begins, and the line."""

    def look(self) -> None:
        """Read the rounds that are new.

        Raises:
            ArtifactError: The file cannot be read, or a whole line is damaged.
        """
        try:
            self._read()
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise ArtifactError(
                f"{self._path}", f"it cannot be read ({error})", "run this as the user who made the run"
            ) from error

    def _read(self) -> None:
        found = self._path.stat()
        if (version := (found.st_ino, found.st_size, found.st_mtime_ns)) == self.version:
            return
        with self._path.open("rb") as lines:
            lines.seek(self._at)
            if lines.read(len(self._last)) != self._last:
                self._forget()
                lines.seek(0)
            for line in lines:
                if line.endswith(b"\n"):
                    self._add(opened(self._path, parsed_json(self._path, line), needed=True))
                    self._at, self._last = self._at + len(self._last), line
        self.version, self.changed_at = version, found.st_mtime if self.rounds else None

    def _add(self, record: Mapping[str, Any]) -> None:
        if record["number"] != len(self.rounds) + 1:
            raise damaged(self._path, f"round {record['number']} follows round {len(self.rounds)}")
        self.rounds.append(_round(record))
        for name in {*record["participants"], *record["clients"], *record["refused"]}:
            silo = self.silos.setdefault(
                name,
                dict.fromkeys(("drawn", "used", "missing", "refused"), 0)
                | {"last_used": None, "loss": None, "late": False, "refusal": None},
            )
            silo["drawn"] += name in record["participants"]
            silo["missing"] += name in record["missing"]
            silo["refused"] += name in record["refused"]
            silo["late"] = name in record["missing"]
            silo["refusal"] = record["refused"].get(name, silo["refusal"])
            if (told := record["clients"].get(name)) is not None:
                silo |= {"used": silo["used"] + 1, "last_used": record["number"], "loss": told.get("loss")}


def _round(record: Mapping[str, Any]) -> dict[str, Any]:
    losses = [told["loss"] for told in record["clients"].values() if "loss" in told]  # noise may hide them
    finite = bool(losses) and None not in losses
    return {
        "number": record["number"],
        "planned": record.get("total") or record["planned"],  # earlier versions wrote no total
        "used": len(record["clients"]),
        "drawn": len(record["participants"]),
        "missing": len(record["missing"]),
        "refused": len(record["refused"]),
        "loss": mean(losses) if finite else None,
        "losses": [min(losses), max(losses)] if finite else None,
        "scores": _scores(record["scores"]),
        "seconds": record["seconds"],
        "bytes": {way: sum(record[way].values()) for way in ("uplink", "downlink")},
        "epsilon": None if record["privacy"] is None else float(record["privacy"]["epsilon"]),
    }


def _scores(silos: Mapping[str, Mapping[str, float | int | None]]) -> dict[str, float | None]:
    """Return ``SCORE.STATE`` -> plain mean over the silos that have it; None if one is not finite."""
    names = dict.fromkeys(name for its in silos.values() for name in its if "." in name)  # else a count of rows
    values = {name: [its[name] for its in silos.values() if name in its] for name in names}
    return {
        name: None if None in found else mean(value for value in found if value is not None)
        for name, found in values.items()
    }
