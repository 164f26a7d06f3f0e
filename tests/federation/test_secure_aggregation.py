"""Secure aggregation in whole runs on the tiny base, in this process and in worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.artifacts import RunDirectory
from flexperts.client.client import Client
from flexperts.communication.secure.tally import Tally
from flexperts.config.run import RunConfig
from flexperts.costs.models import describe, meta_base
from flexperts.costs.plan import model_facts, plan_method
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, PrivacyError
from flexperts.parameters.vector import Vector
from flexperts.protection.noise import gaussian_epsilon
from flexperts.server.checkpoint import load_server

Recipe = Callable[..., RunConfig]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "training.local_steps=2", "training.lr=1e-4")
WAYS = ("uplink", "downlink")
SECURE = ("privacy.aggregation=secure", "privacy.clip=100")


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def shared(folder: Path) -> Vector:
    return load_server(RunDirectory(folder).checkpoint).shared.vector


@pytest.mark.parametrize("method", ["flex", "ditto"])
def test_a_secure_run_ends_where_the_plain_one_does(recipe: Recipe, tmp_path: Path, method: str) -> None:
    """But for whole numbers in the place of floats, which training then carries on."""
    settings = (*SHORT, f"method.name={method}")
    first = run_federation(recipe(*settings), tmp_path / "plain")
    second = run_federation(recipe(*settings, *SECURE), tmp_path / "secure")
    plain, secure = shared(tmp_path / "plain"), shared(tmp_path / "secure")
    assert np.abs(plain - secure).max() < 1e-6
    assert not np.array_equal(plain, secure)
    logs = rounds(tmp_path / "secure")
    assert [log["secure"]["exchanges"] for log in logs] == [2, 1]
    assert all(0 < log["secure"]["norm"] < 100 for log in logs)
    assert all(not log["refused"] and len(log["clients"]) == 4 for log in logs)
    assert second["bytes"]["personal_sent"] == first["bytes"]["keys_total"] == 0
    assert second["bytes"]["keys_total"] == sum(sum(log["secure"][way].values()) for log in logs for way in WAYS)
    for name, scores in first["clients"].items():
        for state, nll in scores["nll"].items():
            if nll is not None:  # a state that the method has
                assert abs(nll - second["clients"][name]["nll"][state]) < 1e-3


def test_no_reply_holds_an_update(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added up is random numbers; what a client masks is its clipped update."""
    added, bare = list[Any](), list[Vector]()
    add, train = Tally.add, Client.train

    def noted(tally: Tally, name: str, masked: Any) -> None:
        added.append(masked.copy())
        add(tally, name, masked)

    def trained(client: Client, request: Any) -> Any:
        result = train(client, request)
        bare.append(result.sent.change)
        return result

    monkeypatch.setattr(Tally, "add", noted)
    monkeypatch.setattr(Client, "train", trained)
    run_federation(recipe(*SHORT, "privacy.aggregation=secure", "privacy.clip=0.001"), tmp_path / "run")
    assert len(added) == len(bare) == 8
    for masked, change in zip(added, bare, strict=True):
        assert float(np.linalg.norm(change)) == pytest.approx(0.001, rel=1e-3)
        numbers = masked.view(np.int32).astype(np.float64)
        assert abs(np.corrcoef(numbers, change)[0, 1]) < 6 / change.size**0.5
        assert abs(numbers.std() / 2**32 - 12**-0.5) < 6 / change.size**0.5
    assert all(log["secure"]["norm"] <= 0.001 * 1.001 for log in rounds(tmp_path / "run"))


def test_worker_processes_end_with_the_same_bits_and_a_stopped_run_too(recipe: Recipe, tmp_path: Path) -> None:
    """The masks are other ones in each run; what is left without them is not."""
    config = recipe(*SHORT, *SECURE, "evaluation.every=1")
    run_federation(config, tmp_path / "one")
    two = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": 2, "threads": 1})})
    run_federation(two, tmp_path / "two")
    assert shared(tmp_path / "one").tobytes() == shared(tmp_path / "two").tobytes()

    class Stop(Exception):  # noqa: N818
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "evaluate", lambda *_, **__: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run_federation(config, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "masked-sum.safetensors").exists()
    run_federation(config, tmp_path / "stopped", resume=True)
    assert shared(tmp_path / "stopped").tobytes() == shared(tmp_path / "one").tobytes()


def test_the_plan_has_the_bytes_of_the_keys(recipe: Recipe, tiny_base: Path, tmp_path: Path) -> None:
    config = recipe(*SHORT, *SECURE)
    run_federation(config, tmp_path / "run")
    description = describe(str(tiny_base))
    base = meta_base(description, config.model.dtype)
    clients = sorted(rounds(tmp_path / "run")[0]["clients"])
    plan = plan_method(base, model_facts(description, base), config, clients, 10.0)
    logs = rounds(tmp_path / "run")
    assert sum(log["secure"]["exchanges"] for log in logs) == len(logs) + 1
    for name in clients:  # a run has the keys of as many rounds, one round earlier
        sent = sum(
            log["uplink"][name] + log["secure"]["uplink"][name] - plan.rounds[0].packed[name] for log in logs
        )
        assert 0 < sent < 3000 * len(logs)
        planned = sum(plan.rounds[0].downlink[name].values()) + plan.rounds[0].keys[name]
        got = sum(log["downlink"][name] + log["secure"]["downlink"][name] - planned for log in logs)
        assert 0 < got < 4000 * len(logs)
    assert plan.uplink == sum(sum(each.packed.values()) for each in plan.rounds) / 8


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("federation.aggregation=median", "a robust rule compares single updates"),
        ("compression.kind=top_k", "masked values are whole numbers of 32 bits"),
        ("compression.kind=int8", "masked values are whole numbers of 32 bits"),
        ("privacy.noise=central", "the server has no single update to clip"),
        ("privacy.noise=local", "local noise is more than a sum needs"),
        ("method.name=fedalt", "it needs a mean of replies that are the sent weights"),
        ("method.options.aggregation=truncated", "it needs a mean of replies that are the sent weights"),
        ("federation.participation=0.5", "with its settings it needs at least 3"),
    ],
)
def test_what_it_excludes_is_refused_before_round_1(
    recipe: Recipe, tmp_path: Path, setting: str, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule) as error:
        run_federation(recipe(*SHORT, *SECURE, setting), tmp_path / "run")
    assert "privacy.aggregation = 'secure'" in str(error.value)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_client_sends_no_update_without_masks(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server asks: here it has forgotten the keys."""
    monkeypatch.setattr("flexperts.server.strategy.is_secure", lambda config: False)
    with pytest.raises(
        PrivacyError, match=r"for an update without masks: with privacy.aggregation = 'secure' none is"
    ):
        run_federation(recipe(*SHORT, *SECURE), tmp_path / "run")


def test_clients_add_their_shares_of_noise_before_they_mask(recipe: Recipe, tmp_path: Path) -> None:
    """The sum has the noise that a trusted server would add; with all four clients a third more variance."""
    noise = ("privacy.noise=distributed", "privacy.clip=0.01", "privacy.noise_multiplier=5", "evaluation.every=1")
    config = recipe(*SHORT, "privacy.aggregation=secure", *noise, "federation.rounds=1")
    summary = run_federation(config, tmp_path / "noised")
    start = run_federation(
        recipe(*SHORT, *SECURE[:1], "privacy.clip=1e-12", "federation.rounds=1"), tmp_path / "bare"
    )
    moved = shared(tmp_path / "noised").astype(np.float64) - shared(tmp_path / "bare")
    assert abs(moved.std() / (5 * 0.01 * (4 / 3) ** 0.5 / 4) - 1) < 0.05
    exact = gaussian_epsilon(5, 1e-5)
    assert exact < summary["privacy"]["epsilon"] < 1.2 * exact  # the Renyi bound is a little larger
    assert summary["privacy"]["mode"] == "distributed"
    assert start["privacy"] is None
    [log] = rounds(tmp_path / "noised")
    assert all("loss" not in told and "tokens" not in told for told in log["clients"].values())
    assert not log["refused"]
    assert "spoilt" not in log["secure"]


def test_a_share_of_noise_is_refused_without_masks(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hide an update that is seen singly"):
        run_federation(recipe("privacy.noise=distributed"), tmp_path / "run")
