"""FedProx and SCAFFOLD on least squares, f_i(x) = 0.5 ||A_i x - b_i||^2, where all is known; then tiny runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from flexperts.communication.average import capped
from flexperts.communication.messages import Update, encode
from flexperts.config.run import RunConfig, TrainingConfig
from flexperts.data.prompts import Example
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.fedprox import FedProx
from flexperts.methods.kit.local_steps import proximal
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site, Turn
from flexperts.methods.registry import method_class
from flexperts.methods.scaffold import Scaffold
from flexperts.parameters.split import split_parameters
from flexperts.parameters.vector import Payload
from flexperts.training.local import LocalSettings, TrainResult

Recipe = Callable[..., RunConfig]
Array = NDArray[np.float64]

ROWS = {"a": 5, "b": 1, "c": 3}
A = {
    "a": np.array([[2.0, 0.0], [0.0, 0.5], [0.3, 0.1]]),
    "b": np.array([[0.4, 0.2], [0.0, 1.8], [0.1, 0.0]]),
    "c": np.array([[1.0, 0.6], [0.2, 1.1], [0.0, 0.7]]),
}
B = {"a": np.array([4.0, -1.0, 0.5]), "b": np.array([-1.0, 5.0, 0.0]), "c": np.array([-3.0, -2.0, 1.0])}
TRAINING = TrainingConfig(batch_size=1, lr=0.1, max_grad_norm=1e9, optimizer="sgd")
SETTINGS = LocalSettings(training=TRAINING, precision="fp32", pad_token_id=0, steps=8, total_steps=10**9)


def gradient(client: str, x: Array) -> Array:
    return np.asarray(A[client].T @ (A[client] @ x - B[client]))


def optimum(clients: Sequence[str] = tuple(ROWS)) -> Array:
    """Of sum_i (n_i / n) f_i, by the normal equations."""
    left = sum(ROWS[c] * A[c].T @ A[c] for c in clients)
    right = sum(ROWS[c] * A[c].T @ B[c] for c in clients)
    return np.asarray(np.linalg.solve(left, right))


@dataclass
class Federation:
    """Clients with one parameter x, driven through a method's own client and server sides."""

    method: Method
    settings: LocalSettings = SETTINGS
    start: Sequence[float] = (0.0, 0.0)
    memories: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {c: {} for c in ROWS})
    results: dict[str, TrainResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = Server(Payload.of({"x": torch.tensor(self.start)}), ROWS)
        self.method.start(self.server)

    @property
    def x(self) -> Array:
        return self.server.shared.vector.astype(np.float64)

    def update(self, client: str) -> Update:
        """One client's round, as the framework drives it."""
        model = nn.Module()
        model.x = nn.Parameter(torch.full((2,), math.nan))
        split = split_parameters(dict(model.named_parameters()), {"x"}, ())
        lora: Any = SimpleNamespace(model=model)
        config: Any = None
        site = Site(client, config, lora, (), [Example((1, 2), 1)] * ROWS[client], 0, Prepared())
        matrix, target = (torch.tensor(side[client], dtype=torch.float32) for side in (A, B))

        def objective(model: nn.Module, rows: Sequence[Example], settings: LocalSettings) -> Iterator[Tensor]:
            yield 0.5 * (matrix @ model.get_parameter("x") - target).square().sum()

        received = self.method.broadcast(self.server, client).tensors()
        settings = replace(self.settings, first_step=self.server.round * self.settings.steps)
        stream = torch.Generator()
        turn = Turn(
            site,
            self.server.round + 1,
            split,
            {},
            received,
            self.memories[client],
            settings,
            stream,
            objective=objective,
        )
        self.method.receive(turn)
        self.results[client] = self.method.train(turn)
        payload = encode(split, self.method.outgoing(turn)).check(self.method.uplink(self.server, client), client)
        return Update(client, payload, ROWS[client], {})

    def round(self, participants: Sequence[str] = tuple(ROWS)) -> None:
        self.method.aggregate(self.server, (self.update(client) for client in participants))
        self.server.round += 1


def descend(
    client: str, x: Array, rates: Sequence[float], shift: Callable[[Array], Array], clip: float = math.inf
) -> tuple[Array, Array]:
    """Return where plain SGD ends, and the rate-weighted mean of its clipped gradients."""
    y, total = x.copy(), np.zeros_like(x)
    for rate in rates:
        g = gradient(client, y)
        g = g * min(1.0, clip / float(np.linalg.norm(g)))
        y, total = y - rate * (g + shift(y)), total + rate * g
    return y, total / sum(rates)


def test_proximal_gradient_is_mu_times_the_distance() -> None:
    theta = {"a": nn.Parameter(torch.tensor([3.0, -1.0])), "b": nn.Parameter(torch.tensor([[5.0]]))}
    penalty = proximal(theta, {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0]])}, 0.5)
    assert penalty is not None
    value = penalty()
    torch.autograd.backward(value)
    assert value.item() == pytest.approx(0.25 * (4 + 4 + 9))
    assert theta["a"].grad is not None
    assert theta["a"].grad.tolist() == [1.0, -1.0]
    assert theta["b"].grad is not None
    assert theta["b"].grad.tolist() == [[1.5]]


def test_anchors_stand_still_when_they_are_the_parameters_themselves() -> None:
    theta = {"a": nn.Parameter(torch.tensor([1.0]))}
    penalty = proximal(theta, theta, 1.0)
    with torch.no_grad():
        theta["a"].add_(2.0)
    assert penalty is not None
    assert penalty().item() == pytest.approx(2.0)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedprox_steps_as_by_hand(mu: float) -> None:
    federation = Federation(FedProx(FedProx.Options(mu=mu)), start=(0.5, -0.5))
    x = federation.x
    ends = {c: descend(c, x, [0.1] * 8, lambda y: mu * (y - x))[0] for c in ROWS}
    federation.round()
    assert np.allclose(federation.x, sum(ROWS[c] * ends[c] for c in ROWS) / 9, atol=1e-5)


def test_scaffold_reaches_the_optimum_of_the_sum_where_fedavg_stays_off() -> None:
    scaffold, fedavg = Federation(Scaffold()), Federation(FedAvg())
    for _ in range(30):
        scaffold.round()
        fedavg.round()
    best = optimum()
    assert np.linalg.norm(scaffold.x - best) < 1e-4
    assert np.linalg.norm(fedavg.x - best) > 0.5


def test_scaffold_reaches_it_with_some_clients_per_round_too() -> None:
    federation = Federation(Scaffold())
    for number in range(45):
        federation.round([c for i, c in enumerate(ROWS) if i != number % 3])
    assert np.linalg.norm(federation.x - optimum()) < 1e-4


def test_control_variates_after_one_round_are_mean_local_gradients() -> None:
    federation = Federation(Scaffold(), start=(0.5, -0.5))
    x = federation.x
    means = {c: descend(c, x, [0.1] * 8, lambda y: 0 * y)[1] for c in ROWS}
    federation.round()
    for client, mean in means.items():
        assert np.allclose(federation.memories[client]["x"].double().numpy(), mean, atol=1e-5)
    common = sum(ROWS[c] * means[c] for c in ROWS) / 9
    assert np.allclose(federation.server.memory["x"].double().numpy(), common, atol=1e-5)


def test_scaffold_corrects_after_clipping_and_divides_by_the_real_rates() -> None:
    """Round 2 of a schedule with warm-up in it, by hand: first_step 4, warm-up 6 steps, cosine to step 20."""
    training = TRAINING.model_copy(update={"max_grad_norm": 0.8})
    settings = replace(SETTINGS, training=training, steps=4, warmup_steps=6, total_steps=20)
    federation = Federation(Scaffold(), settings, start=(0.5, -0.5))
    federation.round()
    x, common = federation.x, federation.server.memory["x"].double().numpy()
    own = {c: federation.memories[c]["x"].double().numpy() for c in ROWS}
    rates = [0.1 * 4 / 6, 0.1 * 5 / 6, 0.1, 0.1 * 0.5 * (1 + math.cos(math.pi / 14))]
    by_hand = {c: descend(c, x, rates, lambda y, c=c: common - own[c], 0.8) for c in ROWS}  # type: ignore[misc]
    updates = {c: federation.update(c) for c in ROWS}
    for client, (end, mean) in by_hand.items():
        sent = {n: t.double().numpy() for n, t in updates[client].tensors().items()}
        assert federation.results[client].lr_sum == pytest.approx(sum(rates))
        assert np.allclose(sent["x"], end, atol=1e-5)
        assert np.allclose(federation.memories[client]["x"].double().numpy(), mean, atol=1e-5)
        assert np.allclose(sent["derived.control.x"], mean, atol=1e-5)


def test_the_servers_control_variates_stay_the_mean_of_all_clients() -> None:
    """Also of clients that did not take part; and the server's rate scales its step in x alone."""
    federation = Federation(Scaffold(Scaffold.Options(server_lr=0.5)))
    for participants in (["a", "c"], ["b"], ["b", "c"]):
        x, mean = federation.x, np.zeros(2)
        updates = [federation.update(client) for client in participants]
        for update in updates:
            mean += update.rows / sum(u.rows for u in updates) * update.tensors()["x"].double().numpy()
        federation.method.aggregate(federation.server, updates)
        assert np.allclose(federation.x, x + 0.5 * (mean - x), atol=1e-6)
        held = {c: m["x"].double().numpy() for c, m in federation.memories.items() if m}
        expected = sum(ROWS[c] * held[c] for c in held) / 9
        assert np.allclose(federation.server.memory["x"].double().numpy(), expected, atol=1e-5)


def off(federation: Federation) -> float:
    """Return how far c is from the mean by rows of the c_i that the run's clients have."""
    rows = federation.server.counted
    mean = sum(n * federation.memories[c].get("x", torch.zeros(2)).double() for c, n in rows.items())
    return float((federation.server.memory["x"] - mean / sum(rows.values())).norm())


def test_a_lost_reply_is_made_good_by_the_clients_next_one() -> None:
    federation = Federation(Scaffold())
    federation.round()
    federation.update("a")  # it trains and keeps its c_i, and the reply does not arrive
    federation.round(("b", "c"))
    assert off(federation) > 0.01
    for _ in range(40):
        federation.round()
        assert off(federation) < 1e-5
    assert np.linalg.norm(federation.x - optimum()) < 1e-4


def test_a_server_of_an_earlier_version_takes_its_c_as_every_clients() -> None:
    """It has no client's own: counted as 0, they would pull c away until each takes part again."""
    federation = Federation(Scaffold())
    federation.round()
    c = federation.server.memory["x"].clone()
    for participants in ((), ("b",), tuple(ROWS)):
        for name in [name for name in federation.server.memory if name.startswith("last.")]:
            del federation.server.memory[name]
        federation.server.memory["x"] = c
        if participants:
            federation.round(participants)
        else:
            federation.method.regroup(federation.server)
        total = sum(ROWS.values())
        own = {name: federation.memories[name]["x"] if name in participants else c for name in ROWS}
        expected = sum(ROWS[name] / total * value for name, value in own.items())
        assert torch.allclose(federation.server.memory["x"], expected, atol=1e-5)
    assert off(federation) < 1e-5


def test_control_variates_follow_the_clients_of_a_run() -> None:
    """c is a forgotten silo, then joins again with what it kept."""
    federation = Federation(Scaffold())
    method, server = federation.method, federation.server
    federation.round()
    server.clients = {name: ROWS[name] for name in ("a", "b")}
    method.regroup(server)
    assert off(federation) < 1e-6
    for _ in range(60):
        federation.round(("a", "b"))
        assert off(federation) < 1e-5
    assert np.linalg.norm(federation.x - optimum(("a", "b"))) < 1e-4
    server.clients, federation.memories["c"] = dict(ROWS), {}
    method.regroup(server)
    assert off(federation) < 1e-6
    for _ in range(60):
        federation.round()
        assert off(federation) < 1e-5
    assert np.linalg.norm(federation.x - optimum()) < 1e-4


def test_control_variates_count_by_the_rows_of_the_run_and_not_of_the_round() -> None:
    """In a round a client counts for less than in the run, where more clients share with it."""
    federation = Federation(Scaffold())
    federation.server.max_share = 0.4
    for participants in (["a", "b"], ["a", "b", "c"], ["b", "c"]):
        updates = [federation.update(client) for client in participants]
        rows = capped([ROWS[client] for client in participants], 0.4)
        counted = [replace(update, rows=n) for update, n in zip(updates, rows, strict=True)]
        federation.method.aggregate(federation.server, counted)
        assert off(federation) < 1e-5


def test_a_round_without_any_rate_leaves_the_control_variates() -> None:
    federation = Federation(Scaffold(), replace(SETTINGS, steps=1, warmup_steps=5, total_steps=20))
    update = federation.update("a")
    assert federation.results["a"].lr_sum == 0
    assert update.tensors()["derived.control.x"].tolist() == [0, 0]
    assert federation.memories["a"]["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("overrides", "value"),
    [((), "training.optimizer = 'adamw'"), (("training.optimizer=sgd", "training.weight_decay=0.1"), "0.1")],
)
def test_scaffold_refuses_what_is_not_plain_sgd(recipe: Recipe, overrides: Sequence[str], value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        Scaffold().check(recipe("method.name=scaffold", *overrides))
    Scaffold().check(recipe("method.name=scaffold", "training.optimizer=sgd", "training.warmup_ratio=0.1"))


@pytest.mark.parametrize("options", [{"mu": -0.1}, {"mue": 0.1}])
def test_fedprox_refuses_wrong_options(options: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match="mu"):
        method_class("fedprox").Options.model_validate(options)


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "shared" / "adapter_model.safetensors")


def test_fedprox_with_mu_0_is_fedavg_and_a_stiff_spring_holds(recipe: Recipe, tmp_path: Path) -> None:
    common = ("training.optimizer=sgd", "training.lr=0.1", "training.local_steps=4", "evaluation.max_new_tokens=1")
    runs = {"fedavg": "{}", "fedprox": "{mu=0.0}", "held": "{mu=8.0}"}
    for folder, options in runs.items():
        name = "fedprox" if folder == "held" else folder
        run_federation(recipe(f"method.name={name}", f"method.options={options}", *common), tmp_path / folder)
    free, zero, held = (adapter(tmp_path / folder) for folder in runs)
    assert all(torch.equal(free[name], zero[name]) for name in free)
    moved = {
        k: sum(t.square().sum() for n, t in a.items() if "lora_B" in n) for k, a in (("free", free), ("held", held))
    }
    assert 0 < moved["held"] < 0.7 * moved["free"]  # B starts at 0


def test_scaffold_sends_twice_fedavgs_tensors_and_keeps_its_controls(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(
        "method.name=scaffold", "training.optimizer=sgd", "training.lr=0.1", "evaluation.max_new_tokens=1"
    )
    run_federation(config, tmp_path)
    shared = adapter(tmp_path)
    values = sum(t.numel() for t in shared.values())
    logs = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    for log in logs:
        assert set(log["declared"]["uplink"].values()) == set(log["declared"]["downlink"].values()) == {8 * values}
        assert log["personal_sent"] == 0
    held = [load_file(p) for p in sorted((tmp_path / "personal").glob("*.safetensors")) if ".before" not in p.name]
    assert len(held) == 4
    server = load_file(next(p for p in tmp_path.glob("*.safetensors")))
    for name in shared:
        mean = torch.stack([h[f"memory.{name}"] for h in held]).mean(0)  # equal rows
        assert torch.allclose(server[f"memory/{name}"], mean, atol=1e-6)
        assert "lora_B" not in name or mean.abs().sum() > 0  # A hardly moves while B is near 0
