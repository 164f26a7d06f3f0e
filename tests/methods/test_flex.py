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
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, ModelError
from flexperts.methods.flex import Flex
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.grafts import GATES, Grafts
from flexperts.protection.pipeline import check_protections
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


@pytest.mark.parametrize("method", ["flex", "local"])
def test_gates_train_at_their_own_rate_with_every_method_that_has_them(
    recipe: Recipe, tmp_path: Path, method: str
) -> None:
    """The first step of a run is at the peak rates: groups of parameters by rate, by their shapes."""
    seen: list[dict[float, set[tuple[int, ...]]]] = []

    def record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append({group["lr"]: {tuple(p.shape) for p in group["params"]} for group in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(record)
    rates = ("training.lr=0.01", "training.personal_lr=0.02", "graft.gate_lr=0.5")
    short = ("federation.rounds=1", "training.local_steps=1", "evaluation.max_new_tokens=1")
    run_federation(recipe(f"method.name={method}", "graft.experts=2", *rates, *short), tmp_path / "run")
    handle.remove()
    assert [set(groups) for groups in seen] == [{0.01, 0.02, 0.5} if method == "flex" else {0.02, 0.5}] * 4
    assert all(groups[0.5] == {(2, 32), (2,)} for groups in seen)
    assert all((2,) not in groups[rate] for groups in seen for rate in groups if rate != 0.5)


def test_a_gate_steps_by_its_rate_times_its_gradient(take_turn: Any) -> None:
    """SGD: gates at 0.7; the experts they belong to at training.lr = 0.1."""
    with take_turn() as (method, turn):
        turn.settings = replace(turn.settings, steps=1, own_lr={GATES: 0.7})
        before = {n: p.detach().clone() for n, p in turn.split.personal.items()}
        gradients: dict[str, Tensor] = {}
        for name, parameter in turn.split.personal.items():
            parameter.register_hook(lambda g, n=name: gradients.update({n: gradients.get(n, 0) + g}))
        method.train(turn)
        for name, parameter in turn.split.personal.items():
            rate = 0.7 if "graft_gate" in name else 0.1
            torch.testing.assert_close(
                parameter.detach(), before[name] - rate * gradients[name], rtol=1e-4, atol=1e-6
            )


TRUNCATED = 'method.options={aggregation="truncated"}'


def test_the_truncated_mean_is_the_best_of_its_rank_and_a_common_graft_is_averaged() -> None:
    """Three clients, rank 2: the dense mean of products by rows, cut by an SVD in float64; the rest by rows."""
    rows = {"a": 5, "b": 1, "c": 3}
    layers, graft = ("x.q_proj", "x.v_proj"), "common_graft.layers.0.graft_gate_weight"

    def sent(seed: int) -> dict[str, Tensor]:
        stream = torch.Generator().manual_seed(seed)
        shapes = {f"base_model.model.{x}.lora_A.weight": (2, 7) for x in layers}
        shapes |= {f"base_model.model.{x}.lora_B.weight": (5, 2) for x in layers} | {graft: (1, 7)}
        return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}

    method = Flex(Flex.Options(aggregation="truncated"))
    server = Server(Payload.of(sent(0)), rows)
    replies = {client: sent(seed) for seed, client in enumerate(rows, 1)}
    method.aggregate(server, [Update(c, Payload.of(tensors), rows[c], {}) for c, tensors in replies.items()])
    new = server.shared.tensors()
    assert server.shared.manifest == Payload.of(sent(0)).manifest
    mean = sum(rows[c] / 9 * tensors[graft].double() for c, tensors in replies.items())
    torch.testing.assert_close(new[graft].double(), mean, rtol=1e-6, atol=1e-6)
    for layer in layers:
        A, B = (f"base_model.model.{layer}.lora_{x}.weight" for x in "AB")
        dense = sum(rows[c] / 9 * (t[B].double() @ t[A].double()) for c, t in replies.items())
        U, S, Vt = torch.linalg.svd(dense)
        best = U[:, :2] @ torch.diag(S[:2]) @ Vt[:2]
        torch.testing.assert_close(new[B].double() @ new[A].double(), best, rtol=1e-5, atol=1e-5)
        factors = [sum(rows[c] / 9 * t[name].double() for c, t in replies.items()) for name in (B, A)]
        assert (factors[0] @ factors[1] - best).abs().max() > 0.1


@pytest.mark.parametrize(
    "setting", ["privacy.noise=local", "federation.aggregation=median", "compression.kind=int8"]
)
def test_the_truncated_mean_excludes_what_works_on_a_mean_of_factors(recipe: Recipe, setting: str) -> None:
    config = recipe(TRUNCATED, setting)
    with pytest.raises(ConfigError, match="'flex' with aggregation = 'factors'"):
        check_protections(make_method(config.method), config)
    check_protections(make_method(recipe().method), recipe(setting))
