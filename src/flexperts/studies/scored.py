"""The rows on which runs will be scored: other rows than the reference's are refused before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexperts.client.answer_limit import scored_rows
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, load_clients
from flexperts.errors import ConfigError
from flexperts.studies.contrast import texts_of
from flexperts.studies.entries import ComparisonPlan, Entry
from flexperts.studies.finished import SEED, finished_marks


def check_scored_rows(plan: ComparisonPlan, claim: Mapping[str, Any], out: Path) -> None:
    """Refuse entries that would be scored on other rows than the reference with the same seed.

    Rows are read only where settings differ that decide them, and only once for the same settings.

    Args:
        plan: The comparison to run.
        claim: The description of the directory, with the reference and all entries.
        out: The directory.
    """
    reference = Entry(claim["reference"], tuple(claim["entries"][claim["reference"]]))
    read: dict[str, tuple[int, str]] = {}
    for entry, seed in _pairs(plan, claim, out):
        ours, theirs = (plan.config(each, seed) for each in (entry, reference))
        if _settings(ours) != _settings(theirs):
            (count, rows), (other, wanted) = (_rows(config, read) for config in (ours, theirs))
            if rows != wanted:
                raise _refusal(entry, f"seed {seed}: {count} scored rows", f"the {other} of {reference.name!r}")


def _pairs(plan: ComparisonPlan, claim: Mapping[str, Any], out: Path) -> Iterator[tuple[Entry, int]]:
    """Yield the runs that are compared: those that are planned, and those of the directory that have finished."""
    planned = {entry.name for entry in plan.entries}
    for name, settings in claim["entries"].items():
        finished = {int(mark.parent.name.removeprefix(SEED)) for mark in finished_marks(out, name)}
        for seed in sorted({*plan.seeds} if name in planned else finished):
            yield Entry(name, tuple(settings)), seed


def _settings(config: RunConfig) -> str:
    """Return the settings that decide which rows a run is scored on, as JSON."""
    data, evaluation = config.data.model_dump(mode="json"), config.evaluation
    encoding = (config.model.base, config.model.template, config.training.max_length, config.training.objective)
    scored = (evaluation.split, evaluation.rows, evaluation.clients)
    return json.dumps([config.seed, data, scored, encoding if _drops(config) else None], sort_keys=True)


def _drops(config: RunConfig) -> bool:
    """Return whether rows that cannot be encoded are left out of some client's."""
    return any(config.data.of_client(name).on_bad_row == "drop" for name in ("", *config.data.clients))


def _rows(config: RunConfig, read: dict[str, tuple[int, str]]) -> tuple[int, str]:
    """Return the number of a run's scored rows and the SHA-256 of their texts by client.

    Args:
        config: The run.
        read: The same of settings that were read before; it is added to.
    """
    key = _settings(config)
    if key not in read:
        clients = Workspace(config).clients if _drops(config) else load_clients(config.data, config.seed)
        read[key] = _digest(config, clients)
    return read[key]


def _digest(config: RunConfig, clients: Clients) -> tuple[int, str]:
    names = config.evaluation.scored(clients)
    texts = texts_of({n: [row.texts for row in scored_rows(clients[n], config.evaluation)] for n in names})
    return sum(map(len, texts.values())), hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _refusal(entry: Entry, ours: str, theirs: str) -> ConfigError:
    return ConfigError(
        f"entry {entry.name!r} with {list(entry.settings)}, {ours}",
        f"compared runs must be scored on the same rows, and they are not {theirs}",
        "give it the reference's data settings, evaluation.split, rows and clients, or compare it in another --out",
    )
