"""The run directory: what a run leaves behind, and the only thing that reports read.

config.toml            the whole recipe, defaults written out
environment.json       versions and machine
rounds.jsonl           one line per finished round
summary.json           scores, bytes and seconds; written when the method's rounds are done, and once more with
                       the reference's when those are
shared/                the averaged LoRA as an ordinary PEFT adapter folder
checkpoint.safetensors the server's whole state after the last finished round, from which a run is resumed and used
partition.json         who had which rows: counts and hashes
beyond.json            scores on other clients' rows and on general tasks, where the recipe asks for them
personal/NAME.safetensors   each client's personal state, and in personal/before the one of the round before it
                       (in a deployed run they lie at the client)
predictions/NAME.jsonl      each client's generated answers and every row's scores (likewise)
selection/NAME.json         the experts that a client chose, and every expert's loss (likewise)
routing/NAME.jsonl          how each client's rows are routed, by round and state (likewise)
tensorboard/           event files, where --track asks for them
reference/             the reference method's run, laid out the same way
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexperts.errors import ArtifactError

_PACKAGES = (
    "flexperts",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "flwr",
    "numpy",
    "safetensors",
    "rouge-score",
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths and writers of one run.

    Args:
        path: The directory.
    """

    path: Path

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Refuse a path that already holds a run or cannot hold one.

        Raises:
            ArtifactError: It does, or it lies in a file.
        """
        if any(place.is_file() for place in (path, *path.parents)):
            raise ArtifactError(f"{path}", "a file stands in its place", "choose another --out")
        if (path / "config.toml").exists():
            raise ArtifactError(f"{path}", "it already holds a run", "choose another --out, or delete it")

    @classmethod
    def create(cls, path: Path, config_toml: str) -> RunDirectory:
        """Start a run directory with its recipe and environment.

        Raises:
            ArtifactError: It already holds a run, or cannot be written.
        """
        cls.check_free(path)
        run = cls(path)
        write_text(run.path / "config.toml", config_toml)
        write_json(run.path / "environment.json", environment())
        return run

    @classmethod
    def create_or_resume(cls, path: Path, config_toml: str) -> RunDirectory:
        """Start a run directory, or take up the one that is there if its recipe is the same.

        Raises:
            ArtifactError: It holds a run of another recipe, or cannot be written.
        """
        if not (path / "config.toml").exists():
            return cls.create(path, config_toml)
        run = cls.open(path)
        if run.config_toml != config_toml:
            raise ArtifactError(
                f"{path}", "it holds a run of another recipe", "resume with the recipe and --set of the first start"
            )
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            ArtifactError: There is no run.
        """
        if not (path / "config.toml").is_file():
            raise ArtifactError(
                f"{path}", "it holds no run (no config.toml)", "give the --out of a `flexperts run`"
            )
        return cls(path)

    @property
    def config_toml(self) -> str:
        """The run's recipe."""
        return (self.path / "config.toml").read_text(encoding="utf-8")

    @property
    def shared(self) -> Path:
        """Folder of the shared PEFT adapter."""
        return self.path / "shared"

    @property
    def checkpoint(self) -> Path:
        """The server's state."""
        return self.path / "checkpoint.safetensors"

    def environment(self) -> dict[str, Any]:
        """Return package versions and what the machine was."""
        return dict(read_json(self.path / "environment.json"))

    def of_client(self, kind: str, client: str) -> Any:
        """Return a client's ``predictions`` or ``routing`` (lines) or ``selection``; None where there is none."""
        folder = self.path / kind
        if (path := folder / f"{client}.json").exists():
            return read_json(path)
        return read_lines(path) if (path := folder / f"{client}.jsonl").exists() else None

    @property
    def beyond(self) -> Path:
        """File of the scores beyond the clients' own rows."""
        return self.path / "beyond.json"

    @property
    def reference(self) -> Path:
        """Folder of the reference run."""
        return self.path / "reference"

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Add a finished round."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def rounds(self) -> list[dict[str, Any]]:
        """Return all finished rounds."""
        path = self.path / "rounds.jsonl"
        return read_lines(path) if path.exists() else []

    def keep_rounds(self, count: int) -> list[dict[str, Any]]:
        """Return the first rounds and forget later ones: the checkpoint is behind them after a break."""
        kept = self.rounds()[:count]
        write_text(self.path / "rounds.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        """Return the summary.

        Raises:
            ArtifactError: The run has not finished, or the file is damaged.
        """
        path = self.path / "summary.json"
        if not path.exists():
            raise ArtifactError(
                f"{self.path}",
                "the run has not finished (no summary.json)",
                "finish it with `flexperts run --resume`",
            )
        return dict(read_json(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader sees the old file or the new one, never a part.

    Raises:
        ArtifactError: It cannot be written; the old file, if there was one, still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}", f"it cannot be written ({error})", "free some space or choose another folder"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON, atomically; without ``indent`` on one line, for what is large."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's value.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    return _parsed(path, json.loads)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON-lines file.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    return [dict(line) for line in _parsed(path, lambda text: map(json.loads, text.splitlines()))]


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}", f"it cannot be read ({error})", "give a finished run's directory") from error
    except ValueError as error:
        raise ArtifactError(f"{path}", f"it is damaged ({error})", "restore it from a copy or run again") from error


def environment() -> dict[str, Any]:
    """Return package versions and what the machine is."""
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
