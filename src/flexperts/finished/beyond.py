"""Scores of a finished run's models on other clients' rows, general tasks and MMLU.

They need every client's rows in one process, so a deployed run does not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from flexperts.client.client import Client
from flexperts.config.run import RunConfig
from flexperts.data.records import Say, unsaid
from flexperts.data.rows import Row
from flexperts.data.sources import read_source
from flexperts.errors import ModelError
from flexperts.evaluation.mmlu import KnowledgeScore, check_source, mmlu
from flexperts.evaluation.scores import Scores, kinds_in, mean_of
from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import State
from flexperts.observer import Observer, current_observer

Measured = dict[State, dict[str, Any]]
"""State -> client -> numbers."""


def is_wanted(config: RunConfig) -> bool:
    """Return whether a recipe asks for any of these scores."""
    return bool(config.evaluation.others_rows or config.knowledge.general or config.knowledge.mmlu)


def check_beyond(config: RunConfig) -> None:
    """Refuse sources that cannot be read, before a run that needs them at its end."""
    if config.knowledge.general:
        _general_rows(config, current_observer().notice)
    if config.knowledge.mmlu:
        check_source(config.knowledge.mmlu, config.knowledge.mmlu_shots)


def look_beyond(run: TrainedRun, observer: Observer | None = None) -> dict[str, Measured]:
    """Measure what the recipe asks for: ``others``, ``general``, ``mmlu``.

    If all clients have the same model in a state (the untouched base; with most methods the global model), only the
    first client is measured. Such a model is not scored on other clients' rows: these clients report that score.

    Args:
        run: The finished run.
        observer: Receives progress.
    """
    knowledge = run.config.knowledge
    found: dict[str, Measured] = {}
    clients = {name: run.client(name, observer) for name in run.participants}
    own = _own_states(run)
    if run.config.evaluation.others_rows and own and len(clients) > 1:
        found["others"] = {s: {n: _others(run, c, s, clients) for n, c in clients.items()} for s in own}
    if knowledge.general:
        rows = _general_rows(run.config)
        found["general"] = _everywhere(run, clients, lambda c, s: _by_row(c.score(run.request(c.name), s, rows)))
    if knowledge.mmlu:
        found["mmlu"] = _everywhere(run, clients, lambda c, s: _questions(run, c, s))
    return found


def _general_rows(config: RunConfig, say: Say = unsaid) -> tuple[Row, ...]:
    assert config.knowledge.general is not None
    rows = read_source(config.knowledge.general, {}, split="test", on_bad_row=config.data.on_bad_row, say=say)
    return tuple(rows[: config.knowledge.general_rows])


def _everywhere(
    run: TrainedRun, clients: Mapping[str, Client], measure: Callable[[Client, State], dict[str, Any]]
) -> Measured:
    first = dict(list(clients.items())[:1])
    who = {state: clients if state in _own_states(run) else first for state in run.model.method.states}
    return {state: {name: measure(client, state) for name, client in some.items()} for state, some in who.items()}


def _own_states(run: TrainedRun) -> list[State]:
    """Return the states in which clients have different models."""
    method = run.model.method
    return [s for s in method.states if s == "personalized" or (s == "global" and not method.one_global)]


def _others(run: TrainedRun, client: Client, state: State, clients: Mapping[str, Client]) -> dict[str, Any]:
    """Score a client's model on the rows of each other client; in the mean each of them counts once."""
    count = run.config.evaluation.others_rows
    rows: dict[str, tuple[Row, ...]] = {
        name: other.scored_rows[:count] for name, other in clients.items() if other is not client
    }
    each = {n: _numbers(client.score(run.request(client.name), state, r)) for n, r in rows.items()}
    kinds = kinds_in(next(iter(each.values())))
    means = {kind: mean_of(scores[kind] for scores in each.values()) for kind in kinds}
    return {**means, "rows": sum(scores["rows"] for scores in each.values()), "by_client": each}


def _numbers(scores: Scores) -> dict[str, Any]:
    return {**scores.metrics(), "rows": scores.rows}


def _by_row(scores: Scores) -> dict[str, Any]:
    """Return means and every row's scores; all clients have the same rows, so states can be compared by row."""
    return {**_numbers(scores), "by_row": [scores.row(i) for i in range(scores.rows)]}


def _questions(run: TrainedRun, client: Client, state: State) -> dict[str, Any]:
    wanted, known = run.config.knowledge, run.workspace.untouched.mmlu
    assert wanted.mmlu is not None
    key = wanted.mmlu, wanted.mmlu_questions, wanted.mmlu_shots
    if state == "zero_shot" and key in known:
        return _knowledge(known[key])
    score = None
    with client.in_state(run.request(client.name), state) as (model, on_batch), suppress(ModelError):
        score = mmlu(
            model,
            run.workspace.base.tokenizer,
            wanted.mmlu,
            questions=wanted.mmlu_questions,
            shots=wanted.mmlu_shots,
            batch_size=run.config.evaluation.batch_size,
            precision=run.config.model.precision,
            seed=0,
            on_rows=client.counter("evaluation", f"{state} MMLU", wanted.mmlu_questions or 0),
            on_batch=on_batch,
        )
    if score is None:
        client.observer.notice(f"{client.name}, {state}: no MMLU score; its logits are not finite numbers")
    if state == "zero_shot":
        known[key] = score
    return _knowledge(score)


def _knowledge(score: KnowledgeScore | None) -> dict[str, Any]:
    return {name: getattr(score, name, None) for name in ("accuracy", "stderr", "questions")}
