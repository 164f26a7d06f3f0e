"""A plan's figures by hand, and what plans refuse."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from flexperts.costs.plan import DEFAULT_ROWS, DENSE, MethodPlan, Plan, plan
from flexperts.errors import ConfigError, GraftError, ModelError
from flexperts.methods.registry import method_names
from flexperts.testing import save_tiny_base, tiny_model

D, I, N, LAYERS = 32, 16, 4, 2  # noqa: E741
LORA = LAYERS * 8 * ((D + D) + (D + 16) + (D + 16))
EXPERT = 3 * D * I
SITES = 3 * LAYERS
WAYS = ("uplink", "downlink")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("plan") / "tiny", "olmoe"))


def row(made: Plan, name: str) -> MethodPlan:
    return next(m for m in made.methods if m.name == name)


def test_the_usual_comparison_by_hand(tiny: str) -> None:
    made = plan(tiny, settings=["training.personal_moments=fresh"], clients=3, bandwidth=8.0)
    values = sum(p.numel() for p in tiny_model("olmoe").parameters())
    assert [m.name for m in made.methods] == [*(name for name, _, _ in DEFAULT_ROWS), DENSE]
    assert made.model.parameters == values
    assert made.model.active_parameters == values - LAYERS * (N - 2) * EXPERT

    flex, low, whole = row(made, "flex, whole expert"), row(made, "flex, rank 32"), row(made, "moe_fedavg")
    gate = D + 1
    assert (flex.shared, flex.personal) == (LORA, LAYERS * (EXPERT + gate))
    assert low.personal == LAYERS * (32 * (D + 2 * I + I + D) + gate)
    assert flex.uplink == flex.downlink == 4 * LORA
    assert flex.uplink_groups.keys() == {"attention LoRA A", "attention LoRA B"}
    assert flex.personal_state == 4 * flex.personal
    assert flex.seconds == pytest.approx(8 * 2 * 4 * LORA / 8e6)
    assert whole.uplink_groups["experts"] == 4 * LAYERS * N * EXPERT
    assert row(made, "local").uplink == row(made, "local").downlink == 0

    dense = row(made, DENSE)
    assert dense.shared == values - LAYERS * N * (EXPERT + D)
    assert dense.uplink == dense.downlink == 4 * dense.shared
    packed = row(plan(tiny, settings=["compression.downlink=fp16"], clients=3), DENSE)
    assert (packed.uplink, packed.downlink) == (4 * dense.shared, 2 * dense.shared)
    assert packed.at_server == 3 * 6 * dense.shared


def test_memory_is_weights_and_four_times_what_trains(tiny: str) -> None:
    made = plan(tiny, ["fedavg"])
    memory = made.methods[0].memory
    assert (memory.weights, memory.added, memory.gradients, memory.moments) == (
        2 * made.model.parameters,
        4 * LORA,
        4 * LORA,
        8 * LORA,
    )
    assert memory.total == 2 * made.model.parameters + 16 * LORA
    plain = plan(tiny, ["fedavg"], ["training.optimizer=sgd", "model.dtype=float32"]).methods[0].memory
    assert (plain.weights, plain.moments) == (4 * made.model.parameters, 0)


def test_a_stack_grows_with_the_clients_of_the_round_before(tiny: str) -> None:
    """Round 1 sends nothing down, later ones the last round's factors of all clients."""
    (flora,) = plan(tiny, ["flora"], ["federation.rounds=3"], clients=5).methods
    sizes = [{sum(groups.values()) for groups in r.downlink.values()} for r in flora.rounds]
    assert sizes == [{0}, {5 * 4 * LORA}, {5 * 4 * LORA}]
    assert flora.downlink == 5 * 4 * LORA


def test_experts_are_planned_as_if_there_were_most(tiny: str) -> None:
    """Rounds 1 and 2 of the warm-up send nothing and the pair, later ones the pair and 2M - 1 router rows."""
    rounds, options = "federation.rounds=5", "method.options={warmup_rounds=2, max_experts=3}"
    for clients, experts in ((8, 3), (4, 3), (3, 2), (2, 2)):
        (planned,) = plan(tiny, ["fedlease"], [rounds, options], clients=clients).methods
        up, down = ([{sum(g.values()) for g in getattr(r, way).values()} for r in planned.rounds] for way in WAYS)
        routers = 4 * SITES * D * (2 * experts - 1)
        assert up == [{0}, {4 * LORA}, *[{4 * LORA + routers}] * 3]
        assert down == [{0}, {0}, *[{4 * LORA * experts + routers}] * 3]
        assert "max_experts" in planned.note


def test_all_methods_are_planned_or_refused_with_a_reason(tiny: str) -> None:
    made = plan(tiny, ["all"])
    assert {m.method for m in made.methods} | made.refused.keys() == set(method_names())
    assert made.refused.keys() == {"fedlease", "scaffold"}
    assert "SGD" in made.refused["scaffold"]
    assert "set federation.rounds to 6 or more" in made.refused["fedlease"]


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_clients_with_a_rank_are_planned_with_it(tiny: str, method: str) -> None:
    (planned,) = plan(tiny, [method], ["method.options={ranks={bank=2,client-2=4}}"], clients=3).methods
    lora = ("attention LoRA A", "attention LoRA B")
    sent = {name: sum(map(groups.get, lora)) for name, groups in planned.rounds[0].uplink.items()}
    assert sent == {"bank": LORA, "client-1": 4 * LORA, "client-2": 2 * LORA}


def test_a_plan_is_json(tiny: str) -> None:
    made = plan(tiny, ["fedmoe_da"])
    read = json.loads(json.dumps(asdict(made)))
    assert read["methods"][0]["rounds"][0]["uplink"]["client-1"]["derived router rows"] == 4 * LAYERS * N * D
    assert read["methods"][0]["memory"]["total"] == made.methods[0].memory.total


def test_nothing_of_the_size_of_a_model_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of Mixtral are 45 G values: no array of a millionth of them may come to be."""
    zeros = np.zeros

    def small(shape: int, dtype: type = np.float32) -> np.ndarray:
        assert np.prod(shape) < 45_000
        return zeros(shape, dtype)

    monkeypatch.setattr("flexperts.parameters.vector.np.zeros", small)
    (whole,) = plan("mixtral-8x7b", ["moe_fedavg"], clients=2).methods
    assert whole.uplink_groups["experts"] == 4 * 32 * 8 * 3 * 4096 * 14336


def test_broken_rules_are_refused(tiny: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedprox'"):
        plan(tiny, ["fedpro"])
    for bandwidth in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="bandwidth"):
            plan(tiny, bandwidth=bandwidth)
    with pytest.raises(ConfigError, match=r"lora\.projections"):
        plan(tiny, ["fedavg"], ['lora.projections=["w"]'])
    with pytest.raises(GraftError, match="use a number from 1 to 4"):
        plan(tiny, ["flex"], ["graft.experts=5"])
    with pytest.raises(ConfigError, match=r"names 2 clients; plan with clients = 2 or more"):
        plan(tiny, ["hetlora"], ["method.options={ranks={bank=2,shop=2}}"], clients=1)
    with pytest.raises(ConfigError, match="buffer = 10 with 4 clients"):
        plan(tiny, ["fedavg"], ["federation.mode=buffered", "federation.buffer=10"], clients=4)
    with pytest.raises(ConfigError, match="with 4 clients in a round"):
        plan(tiny, ["fedavg"], ["federation.aggregation=krum", "federation.malicious_clients=2"], clients=4)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 260, **sizes}))
    with pytest.raises(ModelError, match="no experts"):
        plan(str(tmp_path), ["fedavg"])


def test_a_floor_is_told(tiny: str) -> None:
    floor = ["floor={}", "data.validation_rows=8", "federation.rounds=5"]
    made = plan(tiny, ["flex", "fedavg"], floor)
    assert [m.note for m in made.methods] == [
        f"floor: up to {count} models read validation and test rows" for count in (6, 2)
    ]
    alone = plan(tiny, ["flex", "fedavg"], [*floor, 'floor.candidates=["local"]'])
    assert [m.note.partition(";")[0] for m in alone.methods] == [
        f"floor: 5 more rounds of training by {name} at each client, nothing sent"
        for name in ("local", "local_lora")
    ]
    assert not any(m.note for m in plan(tiny, ["flex"]).methods)
