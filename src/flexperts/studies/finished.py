"""One entry of a comparison, read from its finished runs on disk.

A comparison's directory: compare.json (what is compared), runs/ENTRY/seed-N/ (ordinary run directories; a file
``done`` marks the finished ones), comparison.json (the results), report.html, report.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.config.run import as_written_now
from flexperts.errors import ArtifactError
from flexperts.files import read_json
from flexperts.methods.registry import method_class
from flexperts.recipe import recorded_recipe

ASCII_WORDS = "rouge-score"
"""Tokenizer of older runs: rouge-score's default, with English letters and digits only."""
CLAIM, RUNS, SEED, DONE = "compare.json", "runs", "seed-", "done"


@dataclass(frozen=True)
class Finished:
    """One entry's finished runs.

    Args:
        name: The entry's name.
        settings: The entry's overrides of the recipe.
        runs: Seed -> run directory.
    """

    name: str
    settings: tuple[str, ...]
    runs: Mapping[int, RunDirectory]

    @classmethod
    def read(cls, out: Path, name: str, settings: Sequence[str]) -> Finished:
        """Return an entry's finished runs in a comparison's directory; there may be none."""
        marks = finished_marks(out, name)
        runs = {int(m.parent.name.removeprefix(SEED)): RunDirectory.open(m.parent) for m in marks}
        return cls(name, tuple(settings), dict(sorted(runs.items())))

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """The runs' summaries, by seed."""
        return [run.summary() for run in self.runs.values()]

    @cached_property
    def beyond(self) -> list[dict[str, Any]]:
        """The runs' scores beyond the clients' own rows, by seed."""
        return [read_json(run.beyond) if run.beyond.exists() else {} for run in self.runs.values()]

    @cached_property
    def predictions(self) -> dict[int, dict[str, list[dict[str, Any]]]]:
        """Seed -> client -> the client's scored rows, with answers and scores."""
        return {s: {c: run.of_client("predictions", c) for c in self.clients} for s, run in self.runs.items()}

    @cached_property
    def others_rows(self) -> int:
        """Number of rows of each other client on which models were scored."""
        return recorded_recipe(next(iter(self.runs.values())).path).evaluation.others_rows

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.summaries[0]["method"])

    @property
    def states(self) -> tuple[str, ...]:
        """The method's model states."""
        return tuple(method_class(self.method).states)

    @property
    def rouge_tokenizer(self) -> str:
        """The tokenizer of ROUGE-L in all runs; if they differ, several names separated by commas."""
        return ", ".join(sorted({s.get("rouge_tokenizer", ASCII_WORDS) for s in self.summaries}))

    @property
    def clients(self) -> list[str]:
        """The clients' names."""
        return sorted(self.summaries[0]["clients"])


def read_claim(out: Path) -> dict[str, Any]:
    """Return the description of a directory's comparison: recipe, entries, reference, bootstrap."""
    path = out / CLAIM
    claim = read_json(path)
    wanted = {"recipe", "entries", "reference", "confidence", "resamples"}
    if not isinstance(claim, dict) or not wanted <= claim.keys():
        raise ArtifactError(f"{path}", f"it must contain {', '.join(sorted(wanted))}", "restore it from a copy")
    return claim | {"recipe": as_written_now(claim["recipe"])}


def finished_marks(out: Path, name: str) -> list[Path]:
    """Return the marks of an entry's finished runs."""
    return sorted((out / RUNS / folder_name(name)).glob(f"{SEED}*/{DONE}"))


def folder_name(entry: str) -> str:
    """Return an entry's name as a folder name."""
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in entry)
