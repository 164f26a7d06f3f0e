"""FedPer and FedRep: the cut between blocks, what moves when, and a global state without the head."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.fedper import FedPer, FedRep
from flexperts.methods.kit.turn import Turn


def names(blocks: int) -> list[str]:
    return [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{factor}.weight"
        for i in range(blocks)
        for factor in "AB"
    ]


def shared_blocks(method: FedPer, blocks: int) -> list[int]:
    shared = method.shared(names(blocks))
    return sorted({int(name.split(".")[4]) for name in shared})


@pytest.mark.parametrize(
    ("blocks", "personal", "shared"),
    [(8, None, 6), (12, None, 9), (24, None, 18), (3, None, 2), (2, None, 1), (12, 1, 11), (12, 11, 1)],
)
def test_the_last_blocks_are_personal(blocks: int, personal: int | None, shared: int) -> None:
    """Blocks are ordered as numbers: 10 comes after 9."""
    for kind in (FedPer, FedRep):
        method = kind(kind.Options(personal_layers=personal))
        assert shared_blocks(method, blocks) == list(range(shared))


@pytest.mark.parametrize(("blocks", "personal"), [(12, 12), (12, 13), (1, None)])
def test_a_cut_that_shares_nothing_is_refused(blocks: int, personal: int | None) -> None:
    with pytest.raises(ConfigError, match=rf"{personal or 1} of {blocks} adapted blocks"):
        FedPer(FedPer.Options(personal_layers=personal)).shared(names(blocks))


def test_a_base_without_numbered_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no block number"):
        FedPer().shared(["base_model.model.h.q_proj.lora_A.weight"])


def steps_of(take_turn: Any, moves: Any, method: str, steps: int, *overrides: str) -> list[set[str]]:
    """Return the groups that each step of a round moved."""
    seen: list[set[str]] = []
    holder: list[Turn] = []
    step = moves(seen, lambda: holder[0])
    with take_turn(f"method.name={method}", *overrides) as (made, turn):
        holder.append(replace(turn, settings=replace(turn.settings, steps=steps), on_step=step))
        step(0.0, 0)  # what stands before the first step
        seen.clear()
        result = made.train(holder[0])
        assert result.steps == len(seen)
        assert all(p.requires_grad for p in turn.split.trained.values())
    return seen


def test_fedper_trains_both_at_once(take_turn: Any, moves: Any) -> None:
    assert steps_of(take_turn, moves, "fedper", 3) == [{"shared", "personal"}] * 3


@pytest.mark.parametrize(
    ("share", "steps", "head", "body"),
    [(0.5, 4, 2, 2), (0.5, 5, 2, 3), (0.25, 4, 1, 3), (0.8, 5, 4, 1), (0.9, 1, 1, 1)],
)
def test_fedrep_trains_the_head_then_the_body(
    take_turn: Any, moves: Any, share: float, steps: int, head: int, body: int
) -> None:
    seen = steps_of(take_turn, moves, "fedrep", steps, f"method.options={{head_share={share}}}")
    assert seen == [{"personal"}] * head + [{"shared"}] * body


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_states_are_body_and_head(take_turn: Any, merged: Callable[..., Any]) -> None:
    ids = torch.arange(24).reshape(2, 12)
    with take_turn("method.name=fedper") as (method, turn):
        before = {n: p.detach().clone() for n, p in turn.split.trained.items()}
        body, head = ({n: t for n, t in before.items() if f".layers.{i}." in n} for i in (0, 1))
        assert turn.split.shared.keys() == body.keys()
        assert turn.split.personal.keys() == head.keys()
        expected = {
            "zero_shot": merged(),
            "global": merged((1.0, body)),
            "personalized": merged((1.0, body), (1.0, head)),
        }
        for state, model in expected.items():
            with method.in_state(turn, state):
                assert torch.allclose(logits(turn.model, ids), logits(model, ids), atol=1e-5)
            assert all(torch.equal(p, before[n]) for n, p in turn.split.trained.items())
        apart = [logits(model, ids) for model in expected.values()]
        assert min((a - b).abs().max().item() for a, b in pairwise(apart)) > 1e-3


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_a_run_shares_the_lower_block_only(recipe: Any, tmp_path: Path, method: str) -> None:
    summary = run_federation(recipe(f"method.name={method}", "training.lr=0.02"), tmp_path / "run")
    adapter = load_file(tmp_path / "run" / "shared" / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in adapter} == {"0"}
    own = load_file(tmp_path / "run" / "personal" / "shop.safetensors")
    assert {name.split(".")[4] for name in own} == {"1"}
    nll = summary["mean"]["nll"]
    assert len({nll["zero_shot"], nll["global"], nll["personalized"]}) == 3
    log = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])
    assert log["declared"]["uplink"]["shop"] == 4 * sum(t.numel() for t in adapter.values())
