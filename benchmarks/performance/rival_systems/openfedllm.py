"""OpenFedLLM's way (arXiv 2402.06954 and the project's README): everything in one loop.

One resident model. For every client of a round the global adapter is set, the round's rows are drawn, a trainer is
built around the model and trains, and a deep copy of the adapter's state goes into a list with one place per
client. Then each tensor is averaged by rows in Python.

Fairness: it keeps no state on disk, checks nothing that is exchanged and counts no bytes; flexperts does all of
that within its rounds.
"""

from __future__ import annotations

import copy

from clock import Clock
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from trainer_per_client import adapted_model, texts, train
from work import Work

State = dict[str, Tensor]


def run(work: Work, clock: Clock) -> State:
    """Run the rounds and return the averaged adapter."""
    model, tokenizer = adapted_model(work), work.encoder.tokenizer
    rows = {name: texts(work, name) for name in sorted(work.clients)}
    shared: State = copy.deepcopy(get_peft_model_state_dict(model))
    local = {name: copy.deepcopy(shared) for name in rows}
    for number in range(1, work.rounds + 1):
        clock.begin()
        for name, dataset in rows.items():
            set_peft_model_state_dict(model, shared)
            clock.count(*train(work, model, tokenizer, dataset.select(work.order(name, number)), number))
            local[name] = copy.deepcopy(get_peft_model_state_dict(model))
        shared = average(local, {name: len(dataset) for name, dataset in rows.items()})
        set_peft_model_state_dict(model, shared)
        clock.end()
    return shared


def average(local: dict[str, State], rows: dict[str, int]) -> State:
    """Return the mean of the clients' states, weighted by their rows."""
    total, first = sum(rows.values()), next(iter(local.values()))
    return {key: sum(state[key] * (rows[name] / total) for name, state in local.items()) for key in first}  # type: ignore[misc]
