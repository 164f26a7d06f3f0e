"""What a client that joins a finished run trains is what the personal phase of a round trains, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexperts.training.local import StepHooks


def copies(turn: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    groups = (turn.split.shared, turn.split.personal)
    return tuple({n: p.detach().clone() for n, p in group.items()} for group in groups)  # type: ignore[return-value]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


def test_the_local_adapter_of_feddpa_trains_in_its_mixture(take_turn: Any) -> None:
    """FedDPA-T trains it first, so the same stream gives the same adapter; plain training does not."""
    after = {}
    for way in ("train", "personalize", "plain"):
        with take_turn("method.name=feddpa_t", "method.options={mix=0.3}", round=2) as (method, turn):
            method.receive(turn)
            before = copies(turn)
            {"train": method.train, "personalize": method.personalize, "plain": lambda t: t.fit(shared=False)}[way](
                turn
            )
            after[way] = copies(turn)
    assert equal(after["train"][1], after["personalize"][1])
    assert equal(before[0], after["personalize"][0])
    assert not equal(after["plain"][1], after["personalize"][1])


def test_local_leaves_the_graft_out_of_a_share_of_the_batches_here_too(take_turn: Any) -> None:
    after = {}
    for way in ("train", "personalize", "plain"):
        with take_turn("method.name=local", "graft.dropout=0.6") as (method, turn):
            if way == "plain":
                turn.fit(hooks=StepHooks())
            else:
                getattr(method, way)(turn)
            after[way] = copies(turn)[1]
    assert equal(after["train"], after["personalize"])
    assert not equal(after["train"], after["plain"])


@pytest.mark.parametrize("settings", [(), ("graft.dropout=0.9",), ('method.options={phases="alternating"}',)])
def test_the_graft_of_flex_trains_in_every_batch(take_turn: Any, settings: tuple[str, ...]) -> None:
    """Without it in the model, a batch would have nothing to learn from."""
    with take_turn("method.name=flex", *settings) as (method, turn):
        before = copies(turn)
        assert method.personalize(turn).steps == turn.settings.steps
        after = copies(turn)
        assert equal(before[0], after[0])
        moved = {n for n in before[1] if not torch.equal(before[1][n], after[1][n])}
        assert any(".gate" in n or "gate" in n for n in moved)
        assert len(moved) > len(before[1]) // 2
