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
from flexperts.config.run import RunConfig, as_written_now
from flexperts.errors import ArtifactError
from flexperts.evaluation.scores import kinds_in
from flexperts.files import opened, read_json
from flexperts.methods.registry import method_class
from flexperts.recipe import recorded_recipe

ASCII_WORDS = "rouge-score"
"""Tokenizer of older runs: rouge-score's default, with English letters and digits only."""
CLAIM, RUNS, SEED, DONE = "compare.json", "runs", "seed-", "done"
KEPT = "chosen"
"""The state of the models that the clients of runs with a floor keep."""


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
        """Seed -> client -> the client's scored rows, with answers and scores, also of what it keeps."""
        found = {s: {c: run.of_client("predictions", c) for c in self.clients} for s, run in self.runs.items()}
        for seed, records in self.kept.items():
            for client, record in records.items():
                test = record["test"]
                nlls = test["rows"][record["chosen"]]
                for row, nll, tokens in zip(found[seed][client], nlls, test["tokens"], strict=True):
                    row["scores"][KEPT] = {"nll": nll, "tokens": tokens}
        return found

    @cached_property
    def choices(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Seed -> client -> the record of its choice; empty unless all are there, with scores on test rows."""
        found = {seed: choices_of(run, self.clients) for seed, run in self.runs.items()}
        return found if all(found.values()) else {}

    @property
    def kept(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The choices, if they say the NLL of what clients keep by row: on preference rows they do not."""
        records = [record for seed in self.choices.values() for record in seed.values()]
        return {} if any("dpo" in record["test"] for record in records) else self.choices

    @cached_property
    def scored(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Seed -> client -> its entry in the summary, with the scores of what it keeps."""
        by_seed = zip(self.runs, self.summaries, strict=True)
        return {seed: with_kept(summary["clients"], self.kept.get(seed, {})) for seed, summary in by_seed}

    @cached_property
    def recipe(self) -> RunConfig:
        """The first run's recipe."""
        return recorded_recipe(next(iter(self.runs.values())).path)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.summaries[0]["method"])

    @property
    def states(self) -> tuple[str, ...]:
        """The method's model states."""
        return tuple(method_class(self.method).states)

    @property
    def scored_states(self) -> tuple[str, ...]:
        """The states that are compared: the method's, and with a floor in all runs also what the clients keep."""
        return (*self.states, KEPT) if self.kept else self.states

    @property
    def rouge_tokenizer(self) -> str:
        """The tokenizer of ROUGE-L in all runs; if they differ, several names separated by commas."""
        return ", ".join(sorted({s.get("rouge_tokenizer", ASCII_WORDS) for s in self.summaries}))

    @property
    def clients(self) -> list[str]:
        """The clients' names."""
        return sorted(self.summaries[0]["clients"])


def choices_of(run: RunDirectory, clients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the clients' records of what they keep; empty unless all are there, with scores on test rows."""
    found = {client: run.of_client("floor", client) for client in clients}
    if not all(its and its["test"] for its in found.values()):
        return {}
    return {client: opened(run.path / "floor", its, needed=True) for client, its in found.items()}


def with_kept(
    clients: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return clients' entries with the scores of what they keep: the NLL alone, no answer is generated with it.

    Args:
        clients: Client -> its scores, by kind and state.
        records: Client -> the record of its choice; clients without one are left as they are.
    """
    found = {name: dict(its) for name, its in clients.items()}
    for name, record in records.items():
        nll = record["test"]["nll"][record["chosen"]]
        its = clients[name]
        found[name] |= {kind: its[kind] | {KEPT: nll if kind == "nll" else None} for kind in kinds_in(its)}
    return found


def read_claim(out: Path) -> dict[str, Any]:
    """Return the description of a directory's comparison: recipe, entries, reference, bootstrap."""
    path = out / CLAIM
    claim = read_json(path)
    wanted = {"recipe", "entries", "reference", "confidence", "resamples"}
    if not isinstance(claim, dict) or not wanted <= claim.keys():
        raise ArtifactError(f"{path}", f"it must contain {', '.join(sorted(wanted))}", "restore it from a copy")
    return claim | {"recipe": as_written_now(claim["recipe"])}


def finished_marks(out: Path, name: str) -> list[Path]:
    """Return the marks of an entry's finished runs; a folder with another name, such as a copy, is no run."""
    found = (out / RUNS / folder_name(name)).glob(f"{SEED}*/{DONE}")
    return sorted(mark for mark in found if mark.parent.name.removeprefix(SEED).isdecimal())


def folder_name(entry: str) -> str:
    """Return an entry's name as a folder name."""
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in entry)
