"""From run directories to one comparison: the value that tables, pages and tests read.

It is plain JSON. Every score is labelled by model state (zero_shot, global, personalized, and with a floor chosen:
what each client keeps) and by the rows on which it was measured: ``own`` rows, ``others`` (the other clients'
rows), ``general`` tasks, ``mmlu``.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from flexperts.artifacts import RunDirectory
from flexperts.config.run import MethodConfig, RunConfig
from flexperts.environment import together
from flexperts.errors import ArtifactError, ConfigError
from flexperts.evaluation.scores import REWARDS, SCORES, Scores, kinds_in, mean_of
from flexperts.files import placeless, read_json
from flexperts.methods.registry import make_method
from flexperts.recipe import recorded_recipe
from flexperts.server.round_log import RoundLog
from flexperts.server.summary import traffic
from flexperts.studies.contrast import abilities, contrasts, have_same_rows, other_tokens
from flexperts.studies.finished import CLAIM, KEPT, RUNS, Finished, choices_of, read_claim, with_kept
from flexperts.studies.floor import floors
from flexperts.studies.over_silos import over_silos
from flexperts.studies.rounds_trained import by_rounds_trained


def collect(
    title: str,
    recipe: str,
    finished: Sequence[Finished],
    reference: str,
    *,
    confidence: float = 0.95,
    resamples: int = 100_000,
    samples: int = 0,
    newcomers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the comparison of finished runs; it contains no row's text unless ``samples`` is above 0.

    Args:
        title: The comparison's title: the name of its directory.
        recipe: The recipe's text, without any entry's settings.
        finished: Entries with at least one finished run each, in the order of the table.
        reference: The entry with which the others are compared.
        confidence, resamples: Settings of the bootstrap.
        samples: Number of scored rows per client to show, with their passages and answers.
        newcomers: Clients that took no part in the runs and joined them afterwards.
    """
    by_name = {entry.name: entry for entry in finished}
    if reference not in by_name:
        others = (
            f", or compare with another entry: --reference {' or '.join(map(repr, by_name))}" if by_name else ""
        )
        raise ArtifactError(
            f"{reference} of {title}",
            "the reference has no finished run",
            f"run the comparison until it has{others}",
        )
    first = by_name[reference]
    against = contrasts(finished, first, confidence, resamples)
    silos = over_silos(finished, first, confidence, resamples)
    usual = _usual_seeds(finished)
    by_rounds = by_rounds_trained(finished, usual)
    return {
        "kind": "comparison",
        "title": title,
        "recipe": tomli_w.dumps(placeless(tomllib.loads(recipe))),
        "environment": together([run.environment() for entry in finished for run in entry.runs.values()]),
        "split": first.summaries[0]["split"],
        "reference": reference,
        "seeds": sorted({seed for entry in finished for seed in entry.runs}),
        "confidence": confidence,
        "resamples": resamples,
        "clients": first.clients,
        "redrawn": not have_same_rows(first.predictions.values()),
        "newcomers": list(newcomers),
        "entries": [
            _entry(entry)
            | {"ability": abilities(entry, confidence, resamples), "against": against.get(entry.name)}
            | ({"floor": found} if (found := floors(entry, confidence, resamples)) else {})
            | ({"other_tokens": differ} if (differ := other_tokens(entry, first)) else {})
            | ({"other_seeds": True} if tuple(entry.runs) != usual else {})
            | {"silos": silos[entry.name], "rounds_trained": by_rounds[entry.name]}
            | {"newcomers": _newcomers(entry, newcomers)}
            for entry in finished
        ],
        "rouge_tokenizer": together([entry.rouge_tokenizer for entry in finished]),
        "examples": examples(first, finished, samples),
    }


def _usual_seeds(finished: Sequence[Finished]) -> tuple[int, ...]:
    """Return the seeds that most entries have finished; of equally many entries, the larger number of seeds."""
    counted = Counter(tuple(entry.runs) for entry in finished)
    return max(counted, key=lambda seeds: (counted[seeds], len(seeds)))


def _setting(setting: str) -> str:
    """Return a KEY=VALUE of an entry without local paths."""
    key, _, value = setting.partition("=")
    try:
        given = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        given = value.strip()
    bare = placeless(given)
    return setting if bare == given else f"{key}={bare if isinstance(bare, str) else json.dumps(bare)}"


def collect_comparison(path: Path, *, samples: int = 0) -> dict[str, Any]:
    """Return the comparison in a directory, from its runs or, without runs, from its ``comparison.json``.

    Args:
        path: The directory.
        samples: As for ``collect``; from a ``comparison.json``, at most the rows in it.
    """
    if not ((path / RUNS).exists() and (path / CLAIM).exists()):
        return _read(path / "comparison.json", samples)
    claim = read_claim(path)
    found = [Finished.read(path, name, settings) for name, settings in claim["entries"].items()]
    finished = [entry for entry in found if entry.runs]
    options = {key: claim[key] for key in ("confidence", "resamples")} | {"samples": samples}
    options["newcomers"] = claim.get("newcomers", [])
    return collect(path.resolve().name, claim["recipe"], finished, claim["reference"], **options)


def _read(path: Path, samples: int) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "comparison" or not found.get("entries"):
        raise ArtifactError(f"{path}", "it contains no comparison", "give the --out of a `flexperts compare`")
    shown = {client: rows[:samples] for client, rows in (found.get("examples") or {}).items() if samples}
    noted = [
        entry | {"budget_note": entry.get("budget_note", _budget(MethodConfig(name=str(entry.get("method")))))}
        for entry in found["entries"]
    ]
    return found | {"entries": noted, "examples": shown}


def collect_run(path: Path | str, *, samples: int = 0) -> dict[str, Any]:
    """Return a single run, and its reference method's run if it has one, as a comparison.

    Args:
        path: The run directory.
        samples: As for ``collect``.

    Raises:
        ArtifactError: There is no finished run.
    """
    run = RunDirectory.open(path)
    summary, other = run.summary(), RunDirectory(run.reference)
    finished = [Finished(str(summary["method"]), (), {int(summary["seed"]): run})]
    if other.has_finished:
        name = str(other.summary()["method"])
        name = f"{name} as reference" if name == finished[0].name else name
        finished.append(Finished(name, (), {int(other.summary()["seed"]): other}))
    recipe = recorded_recipe(run.path).to_toml()
    return collect(run.path.resolve().name, recipe, finished, finished[0].name, samples=samples)


def _entry(entry: Finished) -> dict[str, Any]:
    summaries = entry.summaries
    return {
        "name": entry.name,
        "method": entry.method,
        "budget_note": _budget_of(entry.recipe),
        "settings": [_setting(setting) for setting in entry.settings],
        "seeds": list(entry.runs),
        "own_state": entry.scored_states[-1],
        "trained_state": entry.states[-1],
        "scores": {state: _scores(entry, state) for state in entry.scored_states},
        "bytes": _mean_of([_bytes(run, s["bytes"]) for run, s in zip(entry.runs.values(), summaries, strict=True)]),
        "parameters": {group: summaries[0]["parameters"][group] for group in ("shared", "personal")},
        "seconds": _mean_of([s["seconds"] for s in summaries]),
        "peak_memory": max((s["peak_memory"] for s in summaries if s.get("peak_memory")), default=None),
        "privacy": summaries[0].get("privacy"),
        "rouge_tokenizer": entry.rouge_tokenizer,
        "answers": answer_counts(entry),
        "not_finite": _not_finite(summaries),
        "curves": curves(entry),
        **routing_and_selection(entry),
    }


def _bytes(run: RunDirectory, sent: dict[str, Any]) -> dict[str, Any]:
    """Return a run's bytes; earlier versions took means over all messages, also those without weights."""
    if "replies_with_weights" in sent:
        return sent
    return sent | traffic(RoundLog(**record) for record in run.rounds())


def _budget_of(recipe: RunConfig) -> str:
    """Return the note on a run's budget: its method's, and the second training of a floor."""
    alone = recipe.floor is not None and "local" in recipe.floor.candidates
    second = "its floor trains a second model on each client's rows alone, with a client's steps" if alone else ""
    return "; ".join(filter(None, (_budget(recipe.method), second)))


def _budget(method: MethodConfig) -> str:
    """Return a method's note on its budget; empty for one that is not installed here."""
    try:
        return make_method(method).budget()
    except ConfigError:
        return ""


def _not_finite(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return client -> state -> why the state has no score in a seed."""
    found: dict[str, dict[str, str]] = {}
    for summary in summaries:
        for client, states in (summary.get("not_finite") or {}).items():
            found.setdefault(client, {}).update(states)
    return found


def answer_counts(entry: Finished) -> dict[str, Any] | None:
    """Return the token limits, and each client's counts over all seeds; None if the runs have no counts.

    A client has ``rows`` (scored rows over all seeds), ``longer_references``, and ``cut`` by state.
    """
    seeds = [{client: summary["clients"][client] for client in entry.clients} for summary in entry.summaries]
    told = [client.get("answers") for seed in seeds for client in seed.values()]
    if not all(told):
        return None
    return {
        "max_new_tokens": sorted({its["max_new_tokens"] for its in told}),
        "clients": {c: _answers_of([seed[c] for seed in seeds], entry.states) for c in entry.clients},
    }


def _answers_of(seeds: list[dict[str, Any]], states: tuple[str, ...]) -> dict[str, Any]:
    return {
        "rows": sum(seed["scored_rows"] for seed in seeds),
        "longer_references": sum(seed["answers"]["longer_references"] for seed in seeds),
        "cut": {state: sum(seed["answers"]["cut"][state] for seed in seeds) for state in states},
    }


def _scores(entry: Finished, state: str) -> dict[str, Any]:
    return {
        "own": _kinds([_own(clients, entry.clients, state) for clients in entry.scored.values()]),
        "others": _kinds(_others(entry, state)),
        "general": _kinds(_beyond(entry, "general", state)),
        "mmlu": _kinds(_beyond(entry, "mmlu", state), ("accuracy",)),
    }


def _own(scored: Mapping[str, Any], clients: Sequence[str], state: str) -> dict[str, Any]:
    found = {client: scored[client] for client in clients}
    return {client: {kind: its[kind][state] for kind in kinds_in(its)} for client, its in found.items()}


def _newcomers(entry: Finished, names: Sequence[str]) -> dict[str, Any]:
    """Return state -> scores of those that joined; empty if some could not join some seed's run."""
    seeds = [run.joined() for run in entry.runs.values()]
    if not names or not all(name in seed for seed in seeds for name in names):
        return {}
    kept = [choices_of(run, names) for run in entry.runs.values()] if entry.kept else []
    if kept and all(kept):
        seeds = [with_kept(seed, records) for seed, records in zip(seeds, kept, strict=True)]
    states = [state for state in (*entry.states, KEPT) if state in seeds[0][names[0]]["nll"]]
    return {state: _kinds([_own(seed, names, state) for seed in seeds]) for state in states}


def _beyond(entry: Finished, rows: str, state: str) -> list[dict[str, Any]]:
    """Return, by seed, scores by client on some rows that are not its own; empty where not measured."""
    return [beyond.get(rows, {}).get(state, {}) for beyond in entry.beyond]


def _others(entry: Finished, state: str) -> list[dict[str, Any]]:
    """Return, by seed, scores on other clients' rows, by the client whose model is scored.

    For a model that all clients share, runs do not record such scores; they are computed from the other clients'
    scores on the same rows.
    """
    noted = _beyond(entry, "others", state)
    if state in ("personalized", KEPT) or all(noted):
        return noted
    if not entry.recipe.evaluation.others_rows or len(entry.clients) < 2:
        return [{} for _ in entry.runs]
    return [_of_the_others(seed, state, entry.recipe.evaluation.others_rows) for seed in entry.predictions.values()]


def _of_the_others(clients: Mapping[str, Sequence[Any]], state: str, count: int) -> dict[str, Any]:
    own = {client: _scored([row["scores"][state] for row in rows[:count]]) for client, rows in clients.items()}
    found = {}
    for name in own:
        others = [scores for other, scores in own.items() if other != name]
        kinds = kinds_in(others[0])
        found[name] = {kind: mean_of(scores[kind] for scores in others) for kind in kinds}
    return found


def _scored(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return a client's scores over some of its rows, computed as in a run."""
    nlls = tuple(math.nan if row["nll"] is None else row["nll"] for row in rows)
    points = tuple(math.nan if row["rouge_l"] is None else row["rouge_l"] for row in rows)
    margins = tuple(row["reward_margin"] for row in rows if "reward_margin" in row)
    margins = tuple(math.nan if margin is None else margin for margin in margins)
    return Scores(nlls, tuple(row["tokens"] for row in rows), points, margins=margins).metrics()


def _kinds(seeds: Sequence[Mapping[str, Any]], kinds: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return statistics of each kind of score over seeds and clients; None if a seed was not measured."""
    if not all(seeds):
        return None
    kinds = kinds or kinds_in(next(iter(seeds[0].values())))
    return {kind: statistic([{c: scores[kind] for c, scores in seed.items()} for seed in seeds]) for kind in kinds}


def statistic(seeds: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds (n - 1; None for one seed) of the mean over clients.

    A score that is not finite is missing, and so is every mean that would include it.
    """
    means = [mean_of(seed.values()) for seed in seeds]
    by_client = {client: [seed[client] for seed in seeds] for client in seeds[0]}
    return {**_spread(means), "seeds": means, "clients": {c: _spread(values) for c, values in by_client.items()}}


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(known)), "std": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def _mean_of(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over seeds of nested numbers; a number that a seed does not have counts as 0."""
    keys = dict.fromkeys(key for seed in seeds for key in seed)
    return {key: _mean([seed.get(key) for seed in seeds]) for key in keys}


def _mean(values: Sequence[Any]) -> Any:
    if any(isinstance(value, Mapping) for value in values):
        return _mean_of([value or {} for value in values])
    return float(np.mean([value or 0 for value in values]))


def curves(entry: Finished) -> dict[str, Any]:
    """Return, by state, each score over the evaluated rounds; the training loss is under ``training``."""
    rounds = [run.rounds() for run in entry.runs.values()]
    wanted = [("training", "nll", "clients", "loss")]
    wanted += [
        (state, score, "scores", f"{score}.{state}") for state in entry.states for score in (*SCORES, *REWARDS)
    ]
    found: dict[str, Any] = {}
    for state, score, part, key in wanted:
        if curve := _curve(rounds, part, key):
            found.setdefault(state, {})[score] = curve
    return found


def _curve(seeds: Sequence[Sequence[Mapping[str, Any]]], part: str, key: str) -> dict[str, Any] | None:
    """Return the mean over clients of one number, over rounds; None if no round has it in every seed."""
    points: dict[int, list[float]] = {}
    for logs in zip(*seeds, strict=False):
        values = [mean_of(its[key] for its in log[part].values() if key in its) for log in logs]
        known = [value for value in values if value is not None]
        if len(known) == len(logs):
            points[logs[0]["number"]] = known
    if not points:
        return None
    table = np.array(list(points.values()))
    ends = {"mean": table.mean(1), "low": table.min(1), "high": table.max(1)}
    return {"rounds": list(points)} | {name: over.tolist() for name, over in ends.items()}


_OVER_ROUNDS = ("entropy", "divergence", "agreement", "opening")


def routing_and_selection(entry: Finished) -> dict[str, Any]:
    """Return an entry's ``routing``, ``routing_rounds`` and ``selection``; None where they were not recorded."""
    clients = entry.clients
    lines = [run.of_client("routing", client) or [] for run in entry.runs.values() for client in clients]
    first = next(iter(entry.runs.values()))
    chosen = {c: found for c in clients if (found := first.of_client("selection", c))}
    return {
        "routing": _last(first, clients) if all(lines) else None,
        "routing_rounds": _over_rounds(lines, entry.states[-1]) if all(lines) else None,
        "selection": {c: _selection(found) for c, found in chosen.items()} or None,
    }


def _last(run: RunDirectory, clients: Sequence[str]) -> dict[str, Any]:
    """Return state -> client -> layer -> numbers of a run's last round, without co-selection."""
    routing: dict[str, Any] = {}
    for client in clients:
        lines = run.of_client("routing", client)
        for line in (line for line in lines if line["round"] == lines[-1]["round"]):
            layers = {
                name: {key: value for key, value in layer.items() if key != "co_selection"}
                for name, layer in line["layers"].items()
            }
            routing.setdefault(line["state"], {})[client] = layers
    return routing


def _over_rounds(clients: Sequence[Sequence[Mapping[str, Any]]], own_state: str) -> dict[str, Any]:
    """Return means over seeds, clients and layers, by round; round 0 is the unchanged base."""
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for lines in clients:
        for line in lines:
            if line["state"] == "zero_shot" and line["round"] == lines[0]["round"]:
                layers.setdefault(0, []).extend(line["layers"].values())
            if line["state"] == own_state:
                layers.setdefault(line["round"], []).extend(line["layers"].values())
    rounds = sorted(layers)
    return {"rounds": rounds} | {key: [_over_layers(layers[r], key) for r in rounds] for key in _OVER_ROUNDS}


def _over_layers(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [np.mean(layer[key]) for layer in layers if layer.get(key) is not None]
    return float(np.mean(values)) if values else None


def _selection(found: Mapping[str, Any]) -> dict[str, Any]:
    losses = found["selection"]
    return {layer: {"choice": choice, "loss": losses.get(layer, [])} for layer, choice in found["choice"].items()}


_ENTRIES, _LONGEST = 4, 1500


def examples(reference: Finished, finished: Sequence[Finished], count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of every client with the answers of the base, the reference and the next entries.

    All answers are from the first seed that these entries have in common. Long texts are cut.

    Args:
        reference, finished: As for ``collect``.
        count: Number of rows per client; with 0, no row's text is read.
    """
    if not count:
        return {}
    shown = [reference, *(f for f in finished if f is not reference and f.method != "zero_shot")][:_ENTRIES]
    common = set.intersection(*(set(entry.runs) for entry in shown))
    if not common:
        return {}
    found = {client: _examples(shown, min(common), client, count) for client in reference.clients}
    return {client: rows for client, rows in found.items() if rows}


def _examples(shown: Sequence[Finished], seed: int, client: str, count: int) -> list[dict[str, Any]]:
    kept = [entry.predictions[seed][client] for entry in shown]
    if None in kept:
        return []  # the answers of a deployed run stay at the silos
    found = []
    for lines in zip(*(rows[:count] for rows in kept), strict=True):  # one row, with every entry's answers
        if not all(state in line for entry, line in zip(shown, lines, strict=True) for state in entry.states):
            continue  # kept without its answers
        texts: dict[str, Any] = {key: _cut(lines[0][key]) for key in ("instruction", "context", "response")}
        texts["answers"] = {
            "zero-shot" if state == "zero_shot" else f"{entry.name} {state}": _cut(line[state])
            for entry, line in zip(shown, lines, strict=True)
            for state in entry.states
        }
        found.append(texts)
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
