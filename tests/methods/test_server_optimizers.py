"""FedAvgM, FedAdagrad, FedAdam, FedYogi: numbers by hand, Flower's own classes, tiny runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from safetensors.torch import load_file

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.engines.run import run_federation
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import method_class
from flexperts.parameters.vector import Payload

Recipe = Callable[..., RunConfig]

NAMES = ["fedadagrad", "fedadam", "fedavgm", "fedyogi"]
OPTIONS: dict[str, dict[str, float]] = {
    "fedadagrad": {"server_lr": 0.1, "beta_1": 0.3, "tau": 0.01},
    "fedadam": {"server_lr": 0.1, "beta_1": 0.8, "beta_2": 0.7, "tau": 0.01},
    "fedavgm": {"server_lr": 0.9, "momentum": 0.6},
    "fedyogi": {"server_lr": 0.1, "beta_1": 0.8, "beta_2": 0.7, "tau": 0.01},
}
ROWS = {"a": 3, "b": 1, "c": 4}
# Changes of three weights in three rounds by client: large, growing, and of changing sign.
CHANGES = [
    {"a": [1.0, 0.001, 0.2], "b": [2.0, 0.002, -0.1], "c": [0.5, 0.0, 0.3]},
    {"a": [0.1, 0.1, -0.3], "b": [-0.2, 0.2, -0.1], "c": [0.3, 0.05, -0.2]},
    {"a": [-0.5, 1.0, 0.1], "b": [0.0, 2.0, 0.4], "c": [-1.0, 3.0, 0.0]},
]
START = [1.0, -2.0, 0.25]


def method(name: str) -> Method:
    kind = method_class(name)
    return kind(kind.Options.model_validate(OPTIONS[name]))


def updates(x: np.ndarray[Any, Any], changes: Mapping[str, Iterable[float]]) -> Iterable[Update]:
    for client, change in changes.items():
        weights = torch.tensor(x + np.array(list(change)), dtype=torch.float32)
        yield Update(client, Payload.of({"x": weights}), ROWS[client], {})


def trajectory(name: str) -> list[np.ndarray[Any, Any]]:
    """Return the weights after each round, and check that moments are kept where checkpoints find them."""
    ours = method(name)
    server = Server(Payload.of({"x": torch.tensor(START)}), ROWS)
    ours.start(server)
    found = []
    for changes in CHANGES:
        ours.aggregate(server, updates(server.shared.vector, changes))
        assert server.shared.vector.dtype == np.float32
        assert all(t.dtype == torch.float32 and t.shape == (3,) for t in server.memory.values())
        found.append(server.shared.vector.astype(np.float64))
    return found


def second_moment(name: str, v: float, delta: float, options: Mapping[str, float]) -> float:
    if name == "fedadagrad":
        return v + delta**2
    if name == "fedadam":
        return options["beta_2"] * v + (1 - options["beta_2"]) * delta**2
    return v - (1 - options["beta_2"]) * delta**2 * (1 if v > delta**2 else -1)


def by_hand(name: str, index: int, *, of_momentum: bool = False) -> list[float]:
    """Return one weight after each round, from the papers' formulas; or with the peers' defect in v."""
    o, x, m = OPTIONS[name], START[index], 0.0
    v, found = o.get("tau", 0.0) ** 2, []
    for changes in CHANGES:
        delta = sum(ROWS[c] * changes[c][index] for c in ROWS) / 8
        if name == "fedavgm":
            m = o["momentum"] * m + delta
            x += o["server_lr"] * m
        else:
            m = o["beta_1"] * m + (1 - o["beta_1"]) * delta
            v = second_moment(name, v, m if of_momentum else delta, o)
            x += o["server_lr"] * m / (math.sqrt(v) + o["tau"])
        found.append(x)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_three_rounds_by_hand(name: str) -> None:
    found = np.array(trajectory(name))
    assert np.allclose(found, np.array([by_hand(name, i) for i in range(3)]).T, atol=2e-6)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_the_second_moment_is_of_changes_and_not_of_their_momentum(name: str) -> None:
    found = np.array(trajectory(name))
    wrong = np.array([by_hand(name, i, of_momentum=True) for i in range(3)]).T
    assert (np.abs(found - wrong) > 1e-2).all(axis=1).any()


class OfFlower:
    """One of Flower's own strategies, fed with the same clients."""

    def __init__(self, name: str) -> None:
        o = OPTIONS[name]
        kinds: dict[str, Callable[[], Any]] = {
            "fedadagrad": lambda: flower.FedAdagrad(eta=o["server_lr"], tau=o["tau"]),
            "fedadam": lambda: flower.FedAdam(
                eta=o["server_lr"], beta_1=o["beta_1"], beta_2=o["beta_2"], tau=o["tau"]
            ),
            "fedyogi": lambda: flower.FedYogi(
                eta=o["server_lr"], beta_1=o["beta_1"], beta_2=o["beta_2"], tau=o["tau"]
            ),
            "fedavgm": lambda: flower.FedAvgM(server_learning_rate=o["server_lr"], server_momentum=o["momentum"]),
        }
        self.name, self.options, self.strategy = name, o, kinds[name]()
        if name == "fedavgm":
            self.strategy.current_arrays = ArrayRecord({"x": Array(np.array(START, dtype=np.float32))})
        else:
            self.strategy.beta_1 = o["beta_1"]  # FedAdagrad's constructor takes none
            self.strategy.v_t = {"x": np.full(3, o["tau"] ** 2)}  # Flower starts at 0, the paper at tau^2 or above

    def round(self, number: int, x: np.ndarray[Any, Any], changes: Mapping[str, Iterable[float]]) -> Any:
        if self.name != "fedavgm":
            self.strategy.current_arrays = {"x": x}
        if self.name == "fedadam":  # take its bias correction out again: the paper has none
            b1, b2 = (1 - self.options[b] ** (number + 1) for b in ("beta_1", "beta_2"))
            self.strategy.eta = self.options["server_lr"] * b1 / math.sqrt(b2)
        assume_identity(1)
        replies = []
        for update in updates(x, changes):
            arrays = ArrayRecord({"x": Array(update.vector)})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": update.rows})})
            replies.append(Message(content, dst_node_id=1, message_type="train"))
        arrays, _ = self.strategy.aggregate_train(number, replies)
        return arrays["x"].numpy().astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_three_rounds_equal_flowers_own_class(name: str) -> None:
    theirs, x = OfFlower(name), np.array(START, dtype=np.float32)
    for number, (ours, changes) in enumerate(zip(trajectory(name), CHANGES, strict=True), 1):
        x = theirs.round(number, x, changes)
        assert np.allclose(ours, x, atol=2e-6)


def test_defaults_of_fedavgm_turn_into_fedavg_without_momentum() -> None:
    kind = method_class("fedavgm")
    server = Server(Payload.of({"x": torch.tensor(START)}), ROWS)
    plain = kind(kind.Options.model_validate({"momentum": 0.0}))
    plain.start(server)
    for changes in CHANGES:
        expected = server.shared.vector + sum(ROWS[c] * np.array(changes[c]) for c in ROWS) / 8
        plain.aggregate(server, updates(server.shared.vector, changes))
        assert np.allclose(server.shared.vector, expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_options_out_of_range_are_refused(name: str) -> None:
    for options in ({"server_lr": 0.0}, {"momentum": 1.0}, {"beta_1": 1.0}, {"tau": 0.0}):
        with pytest.raises(ValueError, match=r"server_lr|momentum|beta_1|tau"):
            method_class(name).Options.model_validate(options)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_keeps_moments_and_moves_by_the_servers_rate(recipe: Recipe, tmp_path: Path, name: str) -> None:
    rate = 1.0 if name == "fedavgm" else 0.003
    common = (f"method.options={{server_lr={rate}}}", "federation.rounds=1", "evaluation.max_new_tokens=1")
    run_federation(recipe(f"method.name={name}", *common), tmp_path / name)
    run_federation(recipe("method.name=fedavg", *common[1:]), tmp_path / "fedavg")
    ours, mean = (load_file(tmp_path / run / "shared" / "adapter_model.safetensors") for run in (name, "fedavg"))
    checkpoint = load_file(next((tmp_path / name).glob("*.safetensors")))
    size = sum(t.numel() for t in mean.values())
    moments = [t for n, t in checkpoint.items() if n.startswith("memory/")]
    assert [t.numel() for t in moments] == [size] * (1 if name == "fedavgm" else 2)
    b = [n for n in mean if "lora_B" in n]  # starts at 0, so that its value is its change
    if name == "fedavgm":
        assert all(torch.allclose(ours[n], mean[n], atol=1e-7) for n in b)
        return
    options: Any = method_class(name).Options()
    for n in b:
        change = mean[n].double()
        grown = change**2 if name == "fedadagrad" else 0.01 * change**2
        v = options.tau**2 * (0.99 if name == "fedadam" else 1) + grown
        if name == "fedyogi":
            v = options.tau**2 - grown * torch.sign(options.tau**2 - change**2)
        step = rate * (1 - options.beta_1) * change / (v.sqrt() + options.tau)
        assert torch.allclose(ours[n].double(), step, atol=1e-7)
        assert ours[n].abs().max() > rate / 20
