"""The run directory: all files of a run, and the only input of reports.

Its files::

  config.toml            the whole recipe, defaults written out
  run_id                 32 hex digits; silos keep their state under this id
  environment.json       versions, code and machine
  rounds.jsonl           one line per finished round, with its checksum
  summary.json           scores, bytes and seconds, with their checksum; written when the method's rounds are done,
                         and once more with the reference's when those are
  shared/                the averaged LoRA as an ordinary PEFT adapter folder
  checkpoint.safetensors the server's whole state after the last finished round, to resume and use it
  masked-sum.safetensors with secure aggregation: a round's sum, between the last update and the end of the round
  noised-mean.safetensors with central noise: the same of a round's noised mean
  secure/NAME.json       a client's keys and secrets for it (at the client in a deployed run)
  partition.json         each client's rows: counts and hashes
  beyond.json            scores on other clients' rows and on general tasks, if the recipe asks for them
  personal/NAME.safetensors   each client's personal state; personal/before has that of the round before,
                         personal/settled values from train rows that some methods need, personal/local the states
                         of training alone (in a deployed run these files are at the client)
  copies/NAME.safetensors     the shared weights that a client has, with a packed downlink; copies/before has the
                         version before (likewise)
  predictions/NAME.jsonl      each client's generated answers and every row's scores (likewise)
  floor/NAME.json        which model a client keeps, and the NLL of its candidates by row (likewise)
  selection/NAME.json         the experts that a client chose, and every expert's loss (likewise)
  routing/NAME.jsonl          how each client's rows are routed, by round and state (likewise)
  rows/NAME/train.jsonl       rows that a Python program gave, only where it asked to keep them
  joined/NAME.json            a client that joined after training: its rows (counts and hashes), steps, scores
  region/                a region's socket, its last replies to its root, and the rows and silos that it told it of
  tensorboard/           event files, if --track asks for them
  reference/             the reference method's run, with the same files
  .lock                  the process that writes the directory now
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from flexperts.config.changes import recipe_changes, way_on
from flexperts.config.run import as_written_now
from flexperts.environment import environment, together
from flexperts.errors import ArtifactError
from flexperts.files import (
    content_of,
    damaged,
    json_text,
    mapping,
    opened,
    parsed_json,
    read_json,
    read_lines,
    sealed,
    text_of,
    unlinked,
    unwritable,
    write_json,
    write_text,
)

JOINED = "joined"


@dataclass(frozen=True)
class RunDirectory:
    """Paths and writers of one run.

    Args:
        path: The directory.
    """

    path: Path

    @classmethod
    def check_free(cls, path: Path, recipe: str = "", again: str = "--resume") -> None:
        """Refuse a path that already holds a run or cannot hold one.

        Args:
            path: The path.
            recipe: The recipe to run; if the run in the path has the same one, the remedy says how to resume it.
            again: The option or command that resumes it.

        Raises:
            ArtifactError: It holds a run, a part of it is a file, or no folder can have this name.
        """
        try:
            lies_in_file = any(place.is_file() for place in (path, *path.parents))
            holds_run = any(
                (path / name).exists() for name in ("config.toml", "checkpoint.safetensors", "personal")
            )
        except OSError as error:
            raise ArtifactError(f"{path}", f"it cannot be a folder ({error})", "choose another --out") from error
        if lies_in_file:
            raise ArtifactError(f"{path}", "it is a file, or its parent is a file", "choose another --out")
        if holds_run:
            kept = cls(path).config_toml if recipe and (path / "config.toml").is_file() else ""
            raise ArtifactError(
                f"{path}", *way_on(kept, recipe, again, finished=kept == recipe and cls(path).is_finished)
            )

    @classmethod
    def create(cls, path: Path, config_toml: str) -> RunDirectory:
        """Start a run directory with its recipe and environment.

        Raises:
            ArtifactError: It already holds a run, or cannot be written.
        """
        cls.check_free(path)
        run = cls(path)
        write_text(run.path / "run_id", uuid4().hex + "\n")
        write_json(run.path / "environment.json", environment())
        write_text(run.path / "config.toml", config_toml)  # last: this file makes the directory a run
        return run

    @classmethod
    def create_or_resume(cls, path: Path, config_toml: str) -> RunDirectory:
        """Create a run directory, or open the existing one if its recipe is the same.

        Raises:
            ArtifactError: It holds a run with another recipe, or cannot be written.
        """
        if not (path / "config.toml").exists():
            return cls.create(path, config_toml)
        run = cls.open(path)
        if run.config_toml != config_toml:
            raise ArtifactError(
                f"{path / 'config.toml'}",
                f"it holds a run with another recipe ({recipe_changes(run.config_toml, config_toml)})",
                "resume with the recipe and --set of the first start",
            )
        if not run.checkpoint.exists() and not run.has_finished and run.has_rounds():
            raise ArtifactError(
                f"{run.checkpoint}",
                "it is missing although rounds have finished",
                "restore it from a copy, or start a new run",
            )
        return run

    def note_environment(self) -> None:
        """Add what this process runs on to ``environment.json``, where it differs from what began the run."""
        path, now = self.path / "environment.json", environment()
        before = self.environment() if path.exists() else now
        if (both := together([before, now])) != before or not path.exists():
            write_json(path, both)

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Open an existing run.

        Raises:
            ArtifactError: There is no run, or this user cannot enter its directory.
        """
        path = Path(path)
        try:
            holds_run = (path / "config.toml").is_file()
        except OSError as error:
            raise ArtifactError(
                f"{path}", f"it cannot be read ({error})", "run this as the user who made the run"
            ) from error
        if not holds_run:
            raise ArtifactError(
                f"{path}", "it holds no run (no config.toml)", "give the --out directory of a `flexperts run`"
            )
        return cls(path)

    @property
    def config_toml(self) -> str:
        """The run's recipe."""
        return as_written_now(text_of(self.path / "config.toml"))

    @property
    def run_id(self) -> str:
        """The run's id, the same after it is resumed.

        Raises:
            ArtifactError: It is missing or damaged.
        """
        path = self.path / "run_id"
        found = content_of(path).decode(errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{32}", found):
            raise damaged(path, "it does not hold 32 hex digits")
        return found

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done, also those of the reference method if the recipe has one."""
        reference = tomllib.loads(self.config_toml).get("method", {}).get("reference")
        runs = [self, RunDirectory(self.reference)] if reference else [self]
        return all(run.has_finished for run in runs)

    @property
    def has_finished(self) -> bool:
        """Whether all rounds of this method are done: the summary is written last."""
        return (self.path / "summary.json").exists()

    @property
    def shared(self) -> Path:
        """Folder of the shared PEFT adapter."""
        return self.path / "shared"

    @property
    def checkpoint(self) -> Path:
        """The server's state."""
        return self.path / "checkpoint.safetensors"

    def environment(self) -> dict[str, Any]:
        """Return the package versions and a description of the machine."""
        return mapping(self.path / "environment.json", read_json(self.path / "environment.json"))

    def of_client(self, kind: str, client: str) -> Any:
        """Return a client's predictions or routing (lines), selection or floor, by folder; None if missing."""
        folder = self.path / kind
        if (path := folder / f"{client}.json").exists():
            return read_json(path)
        return read_lines(path) if (path := folder / f"{client}.jsonl").exists() else None

    def joined(self) -> dict[str, dict[str, Any]]:
        """Return the records of the clients that joined after training, by name."""
        paths = sorted((self.path / JOINED).glob("*.json"))
        return {path.stem: opened(path, read_json(path), needed=True) for path in paths}

    @property
    def clients(self) -> list[str]:
        """Names of the finished run's clients that have a model here, sorted.

        These are the clients that the summary scores, those with a state, also without scores, and those that
        joined after training. A client that was drawn in no round has the state with which it began.
        """
        stored = (path.stem for path in (self.path / "personal").glob("*.safetensors"))
        return sorted({*self.summary()["clients"], *stored, *self.joined()})

    @property
    def partition(self) -> Path:
        """File of each client's rows when the run started, as counts and hashes."""
        return self.path / "partition.json"

    @property
    def beyond(self) -> Path:
        """File of the scores beyond the clients' own rows."""
        return self.path / "beyond.json"

    @property
    def reference(self) -> Path:
        """Folder of the reference run."""
        return self.path / "reference"

    @property
    def rounds_file(self) -> Path:
        """File of the finished rounds."""
        return self.path / "rounds.jsonl"

    def has_rounds(self) -> bool:
        """Return whether rounds have been recorded."""
        return self.rounds_file.exists() and self.rounds_file.stat().st_size > 0

    def written_rounds(self) -> int:
        """Return how many whole lines of rounds there are, damaged or not."""
        return content_of(self.rounds_file).count(b"\n") if self.rounds_file.exists() else 0

    def last_round_at(self) -> float | None:
        """Return when the last round was written, in seconds since 1970; None before the first."""
        return self.rounds_file.stat().st_mtime if self.has_rounds() else None

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Add a finished round.

        Raises:
            ArtifactError: It cannot be written completely; ``keep_rounds`` removes an incomplete line.
        """
        try:
            with open(self.rounds_file, "a", encoding="utf-8", opener=unlinked) as lines:
                lines.write(json_text(sealed(record)) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise unwritable(self.rounds_file, error) from error

    def rounds(self) -> list[dict[str, Any]]:
        """Return all finished rounds.

        Raises:
            ArtifactError: The file is damaged.
        """
        lines = read_lines(self.rounds_file) if self.rounds_file.exists() else []
        return [opened(self.rounds_file, line) for line in lines]

    def finished_rounds(self, count: int) -> list[dict[str, Any]]:
        """Return the first ``count`` rounds; later or incomplete lines, after an older checkpoint, are ignored.

        Raises:
            ArtifactError: There are fewer rounds, or they are damaged.
        """
        content = content_of(self.rounds_file) if self.rounds_file.exists() else b""
        lines = content.split(b"\n")[:-1][:count]  # text after the last line end is incomplete
        kept = [opened(self.rounds_file, parsed_json(self.rounds_file, line), needed=True) for line in lines]
        if [record.get("number") for record in kept] != [*range(1, count + 1)]:
            raise damaged(self.rounds_file, f"it holds {len(kept)} of the checkpoint's {count} rounds")
        return kept

    def keep_rounds(self, count: int) -> list[dict[str, Any]]:
        """Return the first rounds, and remove later lines from the file; see ``finished_rounds``."""
        kept = self.finished_rounds(count)
        self.write_rounds(kept)
        return kept

    def write_rounds(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file of the finished rounds, atomically."""
        write_text(self.rounds_file, "".join(json_text(sealed(record)) + "\n" for record in records))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        write_json(self.path / "summary.json", sealed(summary))

    def summary(self, *, checked: bool = False) -> dict[str, Any]:
        """Return the summary.

        Args:
            checked: Whether to refuse also a summary without a checksum.

        Raises:
            ArtifactError: The run has not finished, or the file is damaged.
        """
        path = self.path / "summary.json"
        if not self.has_finished:
            raise ArtifactError(
                f"{self.path}",
                "the run has not finished (no summary.json)",
                "finish it with `flexperts run --resume`",
            )
        return opened(path, read_json(path), needed=checked)
