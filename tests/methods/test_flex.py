"""FLEx's variants: what each setting changes in the parts, in the split and in the order of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ModelError
from flexperts.methods.flex import Flex
from flexperts.parameters.store import load_personal
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.grafts import Grafts
from flexperts.server.checkpoint import load_server
from flexperts.testing import save_tiny_base

Recipe = Callable[..., RunConfig]


def test_each_rule_is_the_one_that_chooses(take_turn: Any) -> None:
    """The paper's rule takes the least error; frequency the most tokens; both read the same scores."""
    for rule, measure in (("reconstruction", lambda s: -s.errors), ("frequency", lambda s: s.counts)):
        with take_turn(f"graft.selection={rule}") as (_, turn):
            with turn.parts["graft"].disabled():
                layers = turn.site.score_experts()
            for layer in layers:
                best = int(measure(layer).argmax())
                assert turn.site.prepared.choice[layer.name] == (best,)


def test_only_the_named_layers_are_grafted(take_turn: Any) -> None:
    with take_turn() as (_, turn):
        every = list(turn.parts["graft"].choice)
    with take_turn("graft.layers=[-1]") as (_, turn):
        assert list(turn.parts["graft"].choice) == every[-1:]
        assert all(every[-1].split(".")[2] in name for name in turn.split.personal)


def test_least_squares_scales_reach_the_grafts(take_turn: Any) -> None:
    with take_turn("graft.experts=2", "graft.selection=greedy", "graft.scale=least_squares") as (_, turn):
        graft = turn.parts["graft"]
        assert isinstance(graft, Grafts)
        assert graft.scales == turn.site.prepared.scales
        assert all(len(scales) == 2 and 1.0 not in scales for scales in graft.scales.values())
    with take_turn("graft.scale=0.5") as (_, turn):
        assert set(turn.site.prepared.scales.values()) == {(0.5,)}


def test_in_place_adapts_the_chosen_expert_at_the_same_budget_without_a_gate(take_turn: Any) -> None:
    with take_turn("graft.place=in_place") as (_, turn):
        assert isinstance(turn.parts["graft"], ExpertAdapters)
        assert turn.parts["graft"].choice == turn.site.prepared.choice
        inside = sum(p.numel() for p in turn.split.personal.values())
        assert not [n for n in turn.split.personal if "gate" in n]
    with take_turn() as (_, turn):
        gates = sum(p.numel() for n, p in turn.split.personal.items() if "graft_gate" in n)
        assert sum(p.numel() for p in turn.split.personal.values()) == inside + gates


@pytest.mark.parametrize("sharing", ["personal", "shared", "both"])
def test_the_gate_can_start_as_the_routers_row_of_its_expert(take_turn: Any, sharing: str) -> None:
    settings = ("graft.gate_start=router", "graft.gate_bias=-1.5", "graft.experts=2", f"graft.sharing={sharing}")
    with take_turn(*settings, disturbed=False) as (_, turn):
        grafts = [graft for part in turn.parts.values() for graft in part]  # type: ignore[attr-defined]
        assert len(grafts) == (4 if sharing == "both" else 2)
        for graft in grafts:
            router = turn.site.lora.base.get_submodule(graft.experts.block).gate
            rows = router.weight[list(graft.indices)]
            # With both, the personal graft gets 0.1 % noise, as every start of it does.
            torch.testing.assert_close(graft.graft_gate_weight, rows, rtol=0, atol=0 if sharing != "both" else 0.01)
            assert graft.graft_gate_bias.tolist() == [-1.5, -1.5]
            hidden = torch.randn(5, rows.shape[1], generator=torch.Generator().manual_seed(0))
            by_hand = torch.sigmoid(hidden @ graft.graft_gate_weight.T - 1.5)
            torch.testing.assert_close(graft.opening(hidden), by_hand)
            assert graft.opening(hidden).std(0).min() > 0.01


def test_a_base_without_the_routers_row_is_refused_before_training(recipe: Recipe, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "nemotron_h", max_position_embeddings=1024)
    settings = (f"model.base={base}", "lora.projections=[]", "training.local_steps=1", "federation.rounds=1")
    with pytest.raises(ModelError, match=r"model\.layers\.\d+\.\w+\.gate reads 32 values, .*experts 24"):
        run_federation(recipe(*settings, "graft.gate_start=router"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sharing", ["personal", "shared", "both"])
def test_who_owns_the_grafted_expert(take_turn: Any, sharing: str) -> None:
    with take_turn(f"graft.sharing={sharing}") as (_, turn):
        shared = {n.split(".")[0] for n in turn.split.shared}
        personal = {n.split(".")[0] for n in turn.split.personal}
    assert shared == {"base_model"} | ({"common_graft"} if sharing != "personal" else set())
    assert personal == ({"graft"} if sharing != "shared" else set())


def test_clients_agree_on_the_expert_of_least_mean_loss() -> None:
    reports = {"a": {"l": [3.0, 1.0, 2.0]}, "b": {"l": [0.0, 4.0, 0.5]}}  # means 1.5, 2.5, 1.25
    assert Flex().agree(reports) == {"l": [2, 0, 1]}
    assert Flex().agree({"a": None, "b": None}) is None


def test_the_shared_expert_starts_alike_on_all_clients_and_is_averaged(recipe: Recipe, tmp_path: Path) -> None:
    """After one round the server holds the mean by rows of what clients trained from one pretrained expert."""
    config = recipe("graft.sharing=shared", "federation.rounds=1", "training.lr=0.02")
    run_federation(config, tmp_path / "run")
    server = load_server(tmp_path / "run" / "checkpoint.safetensors")
    losses = [load_personal(p)[1].selection for p in sorted((tmp_path / "run" / "personal").glob("*.safetensors"))]
    for layer, ranked in server.agreement.items():
        assert ranked[0] == np.mean([loss[layer] for loss in losses], axis=0).argmin()
    assert [n for n in server.shared.tensors() if n.startswith("common_graft.")]
    for path in (tmp_path / "run" / "personal").glob("*.safetensors"):
        assert not load_file(path)


def test_alternating_moves_the_personal_part_first_and_then_the_shared(take_turn: Any, moves: Any) -> None:
    seen: list[set[str]] = []
    with take_turn('method.options={phases="alternating"}', disturbed=False) as (method, turn):
        turn.settings = replace(turn.settings, steps=6)
        turn.on_step = moves(seen, lambda: turn)
        assert method.train(turn).steps == 6
    assert seen == [set(), {"personal"}, {"personal"}, {"shared"}, {"shared"}, {"shared"}]


def test_the_pull_adds_mu_times_the_way_gone(take_turn: Any) -> None:
    """One SGD step from away from the anchor: theta - lr (gradient + mu (theta - anchor))."""

    def stepped(mu: float) -> dict[str, Tensor]:
        with take_turn(f"method.options={{pull={mu}}}") as (method, turn):
            turn.settings = replace(turn.settings, steps=1)
            turn.received = {n: p.detach() + 1.0 for n, p in turn.split.shared.items()}
            method.train(turn)
            return {n: p.detach().clone() for n, p in turn.split.shared.items()}

    without, pulled = stepped(0.0), stepped(0.5)
    for name in without:
        # theta - anchor = -1 everywhere: the pull moves every weight by lr mu.
        torch.testing.assert_close(pulled[name] - without[name], torch.full_like(without[name], 0.1 * 0.5))


def test_dropout_trains_about_its_share_of_batches_without_the_graft(take_turn: Any) -> None:
    enabled: list[bool] = []
    with take_turn("graft.dropout=0.25", disturbed=False) as (method, turn):
        slow = turn.settings.training.model_copy(update={"lr": 1e-3})
        turn.settings = replace(turn.settings, training=slow, steps=40)
        graft = next(iter(turn.parts["graft"]))  # type: ignore[call-overload]
        graft.experts.module.register_forward_hook(lambda *_: enabled.append(turn.parts["graft"].enabled))
        method.train(turn)
        graft.experts.module._forward_hooks.popitem()
    assert len(enabled) == 40
    assert 4 <= enabled.count(False) <= 17
    assert turn.parts["graft"].enabled


def test_a_personal_graft_does_not_follow_the_common_one_that_starts_alike(recipe: Recipe, tmp_path: Path) -> None:
    """Equal starts have equal gradients: after a step both would be one, and be sent as the shared one."""
    config = recipe("graft.sharing=both", "training.local_steps=1", "federation.rounds=1", "evaluation.rows=1")
    assert run_federation(config, tmp_path / "run")["bytes"]["personal_sent"] == 0
