"""One entry of a comparison, as its finished runs left it on disk.

A comparison's directory: compare.json (what is compared), runs/ENTRY/seed-N/ (ordinary run directories; a file
``done`` marks the finished ones), comparison.json (what they come to), report.html, report.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.files import read_json
from flexperts.methods.registry import method_class
from flexperts.recipe import recorded_recipe

ASCII_WORDS = "rouge-score"
"""What runs of before had for words: rouge-score's default, English letters and digits alone."""
CLAIM, RUNS, SEED, DONE = "compare.json", "runs", "seed-", "done"


@dataclass(frozen=True)
class Finished:
    """One entry's finished runs.

    Args:
        name: The entry.
        settings: What it changes of the recipe.
        runs: Seed -> run directory.
    """

    name: str
    settings: tuple[str, ...]
    runs: Mapping[int, RunDirectory]

    @classmethod
    def read(cls, out: Path, name: str, settings: Sequence[str]) -> Finished:
        """Return what a comparison's directory holds of an entry, which may be nothing."""
        marks = finished_marks(out, name)
        runs = {int(m.parent.name.removeprefix(SEED)): RunDirectory.open(m.parent) for m in marks}
        return cls(name, tuple(settings), dict(sorted(runs.items())))

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """The runs' summaries, by seed."""
        return [run.summary() for run in self.runs.values()]

    @cached_property
    def beyond(self) -> list[dict[str, Any]]:
        """What the runs measured beyond their clients' own rows, by seed."""
        return [read_json(run.beyond) if run.beyond.exists() else {} for run in self.runs.values()]

    @cached_property
    def predictions(self) -> dict[int, dict[str, list[dict[str, Any]]]]:
        """Seed -> client -> its scored rows, with answers and scores."""
        return {s: {c: run.of_client("predictions", c) for c in self.clients} for s, run in self.runs.items()}

    @cached_property
    def others_rows(self) -> int:
        """Rows of each other client that models were scored on."""
        return recorded_recipe(next(iter(self.runs.values())).path).evaluation.others_rows

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.summaries[0]["method"])

    @property
    def states(self) -> tuple[str, ...]:
        """The model states that the method has."""
        return tuple(method_class(self.method).states)

    @property
    def rouge_tokenizer(self) -> str:
        """What ROUGE-L counted as words, in all runs; several names with commas where they differ."""
        return ", ".join(sorted({s.get("rouge_tokenizer", ASCII_WORDS) for s in self.summaries}))

    @property
    def clients(self) -> list[str]:
        """The clients' names."""
        return sorted(self.summaries[0]["clients"])


def read_claim(out: Path) -> dict[str, Any]:
    """Return what a directory's comparison is: recipe, entries, reference, bootstrap."""
    path = out / CLAIM
    claim = read_json(path)
    wanted = {"recipe", "entries", "reference", "confidence", "resamples"}
    if not isinstance(claim, dict) or not wanted <= claim.keys():
        raise ArtifactError(f"{path}", f"it holds {', '.join(sorted(wanted))}", "restore it from a copy")
    return claim


def finished_marks(out: Path, name: str) -> list[Path]:
    """Return the marks of an entry's finished runs."""
    return sorted((out / RUNS / folder_name(name)).glob(f"{SEED}*/{DONE}"))


def folder_name(entry: str) -> str:
    """Return an entry's name as a folder's."""
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in entry)
