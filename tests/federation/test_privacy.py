"""Which settings are refused before a run starts, which methods they work with, and what epsilon is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from flexperts.client.client import Client, Request
from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method, method_class, method_names
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import check_enough, check_protections, privacy_spent, reduced
from flexperts.testing import METHOD_SETTINGS

Recipe = Callable[..., RunConfig]
ADDITIVE = [name for name in method_names() if method_class(name).additive]
OTHERS = [name for name in method_names() if not method_class(name).additive]
SETTINGS = ("federation.aggregation=median", "privacy.noise=local", "compression.kind=int8")


def test_there_are_methods_of_both_kinds() -> None:
    assert {"fedavg", "flex", "fedadam", "moe_fedavg", "fedsvd", "comigs"} <= set(ADDITIVE)
    assert {"scaffold", "local", "zero_shot", "fedmoe_style", "flora", "fedex_lora", "rolora"} <= set(OTHERS)


@pytest.mark.parametrize("name", ADDITIVE)
def test_an_additive_methods_reply_is_what_was_sent_after_training(
    recipe: Recipe, tmp_path: Path, name: str
) -> None:
    """In round 1 and, from the weights that one update for all leaves, in round 2."""
    assume_identity(1)
    config = recipe(f"method.name={name}", *METHOD_SETTINGS.get(name, ()), "privacy.noise=central")
    method = make_method(config.method)
    check_protections(method, config)
    workspace = Workspace(config)
    model = ClientModel(workspace.base, config, method)
    client = Client("clinic", workspace, model, tmp_path)
    client.join()
    agreement = method.agree({"clinic": None})
    shared, _ = client.initial(agreement)
    server = Server(shared, dict.fromkeys(workspace.clients, 8), agreement=agreement)
    method.start(server)
    for number in (1, 2):
        payload, before = method.broadcast(server, "clinic"), server.shared.vector.copy()
        trained = client.train(Request(payload, agreement, number))
        weights = Payload.of({n: t for n, t in payload.tensors().items() if not n.startswith("derived.")})
        assert trained.update.payload.manifest == weights.manifest == method.uplink(server, "clinic")
        assert weights.manifest == server.shared.manifest
        assert weights.vector.tobytes() == before.tobytes()
        (update,) = reduced(config, server.shared, [trained.update])
        assert np.linalg.norm(update.vector - before) > 0.01
        method.aggregate(server, [update])
        assert server.shared.manifest == weights.manifest
        assert not np.array_equal(server.shared.vector, before)
        server.round += 1
    model.close()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_other_methods_are_refused(recipe: Recipe, name: str, setting: str) -> None:
    config = recipe(f"method.name={name}", setting)
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError) as caught:
        check_protections(make_method(config.method), config)
    assert str(caught.value).startswith(f"{key} = {value!r} with method {name!r}: ")
    assert f"set {key} = " in caught.value.remedy
    check_protections(make_method(config.method), recipe(f"method.name={name}"))


def starts(config: RunConfig, out: Path) -> str:
    """Return why a run is refused; nothing must be there then."""
    with pytest.raises(ConfigError) as caught:
        run_federation(config, out)
    assert not out.exists()
    return str(caught.value)


def test_a_run_is_refused_before_it_starts(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = starts(recipe("privacy.noise=central", "method.reference=local"), out)
    assert "privacy.noise = 'central' with method 'local'" in said
    said = starts(recipe("privacy.noise=central", "federation.aggregation=krum"), out)
    assert "federation.aggregation = 'krum' with privacy.noise = 'central'" in said
    for sharing in ("shared", "both"):
        for noise in ("central", "local"):
            said = starts(recipe(f"graft.sharing={sharing}", f"privacy.noise={noise}"), out)
            assert f"graft.sharing = {sharing!r} with privacy.noise = {noise!r}" in said
    said = starts(recipe("federation.aggregation=trimmed_mean", "federation.trim=0.2"), out)
    assert "federation.aggregation = 'trimmed_mean' with 4 clients in a round: " in said
    assert "at least 5" in said


def test_what_goes_together_is_not_refused(recipe: Recipe) -> None:
    for settings in (
        ("privacy.noise=local", "federation.aggregation=krum", "compression.kind=top_k"),
        ("privacy.noise=central", "compression.kind=fp16"),
        ("method.name=fedavg", "graft.sharing=shared", "privacy.noise=central"),
    ):
        config = recipe(*settings)
        check_protections(make_method(config.method), config)


@pytest.mark.parametrize(
    ("settings", "clients", "enough"),
    [
        (("mean",), 1, True),
        (("median",), 2, False),
        (("median",), 3, True),
        (("median", "federation.participation=0.5"), 4, False),
        (("trimmed_mean",), 3, False),
        (("trimmed_mean",), 4, True),
        (("krum", "federation.malicious_clients=2"), 4, False),
        (("krum", "federation.malicious_clients=2"), 5, True),
        (("median", "federation.mode=buffered", "federation.buffer=2"), 4, False),
        (("median", "federation.mode=buffered", "federation.buffer=3"), 4, True),
    ],
)
def test_clients_must_be_enough_for_the_rule(
    recipe: Recipe, settings: tuple[str, ...], clients: int, enough: bool
) -> None:
    config = recipe(f"federation.aggregation={settings[0]}", *settings[1:])
    if enough:
        check_enough(config, clients)
        return
    with pytest.raises(ConfigError, match="or it gives no protection"):
        check_enough(config, clients)


def test_without_the_accountant_a_run_does_not_start(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        return None if name == "dp_accounting" else find_spec(name)

    monkeypatch.setattr("flexperts.protection.noise.find_spec", missing)
    assert "pip install 'flexperts[privacy]'" in starts(recipe("privacy.noise=local"), tmp_path / "run")
    config = recipe("compression.kind=fp16", "federation.aggregation=median")
    check_protections(make_method(config.method), config)
    assert privacy_spent(config, 3) is None
    with pytest.raises(ConfigError, match="dp-accounting"):
        privacy_spent(recipe("privacy.noise=central"), 3)


def delta_of(epsilon: float, sigma: float) -> float:
    """Return delta of one Gaussian release of sensitivity 1: Balle and Wang, 2018, theorem 8."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


@pytest.mark.parametrize("rounds", [1, 3, 100])
@pytest.mark.parametrize("multiplier", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_epsilon_against_the_formula(recipe: Recipe, rounds: int, multiplier: float, delta: float) -> None:
    given = (f"privacy.noise_multiplier={multiplier}", f"privacy.delta={delta}")
    spent = privacy_spent(recipe("privacy.noise=central", *given), rounds)
    assert spent is not None
    assert delta_of(spent["epsilon"], multiplier / math.sqrt(rounds)) == pytest.approx(delta, rel=1e-4)
    # Local: twice the distance, so half the noise in its units.
    spent = privacy_spent(recipe("privacy.noise=local", *given), rounds)
    assert spent is not None
    assert delta_of(spent["epsilon"], multiplier / 2 / math.sqrt(rounds)) == pytest.approx(delta, rel=1e-4)


def test_epsilon_is_below_what_renyi_accounting_says(recipe: Recipe) -> None:
    """As it must, but not by much; the clip does not matter."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    spent = privacy_spent(recipe("privacy.noise=central", "privacy.clip=0.3"), 10)
    assert spent is not None
    renyi = RdpAccountant().compose(GaussianDpEvent(1.0), 10).get_epsilon(1e-5)
    assert 0.85 * renyi < spent["epsilon"] <= renyi
    assert spent == {
        "mode": "central",
        "clip": 0.3,
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "epsilon": pytest.approx(17.8566, abs=1e-3),
    }


def test_nothing_is_spent_before_the_first_round(recipe: Recipe) -> None:
    spent = privacy_spent(recipe("privacy.noise=central"), 0)
    assert spent is not None
    assert spent["epsilon"] == 0
    assert privacy_spent(recipe(), 5) is None


def test_the_documented_table_is_what_is_computed(recipe: Recipe) -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    for multiplier in (0.5, 1, 2, 5, 10, 20):
        config = recipe("privacy.noise=central", f"privacy.noise_multiplier={multiplier}")
        spent = [privacy_spent(config, rounds) for rounds in (1, 3, 10, 30, 100)]
        cells = [f"{multiplier:g}", *(f"{s['epsilon']:.2f}" for s in spent if s)]
        assert f"| {' | '.join(cells)} |" in page
