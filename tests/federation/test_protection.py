"""Noise and packing on the client, alone and in whole runs on the tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import FederationError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal
from flexperts.parameters.vector import Manifest, Payload, Vector
from flexperts.protection.packing import RESIDUAL
from flexperts.protection.pipeline import privacy_spent, protect
from flexperts.server.checkpoint import load_server
from flexperts.server.kept_round import kept_round
from flexperts.terminal.display import RunDisplay
from flexperts.tracking import scalars

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "lora.dropout=0.1")
PACKED = {
    "fp16": ("compression.kind=fp16",),
    "int8": ("compression.kind=int8",),
    "top_k": ("compression.kind=top_k", "compression.fraction=0.1"),
}


def payload(values: Any) -> Payload:
    vector = np.asarray(values, dtype=np.float32)
    return Payload(Manifest(("w",), (vector.shape,)), vector)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    data = {"data": {"silos": {}}}
    given = {kind: {"kind": kind, "fraction": 0.1, "block": 16} for kind in PACKED}
    return {kind: RunConfig.model_validate(data | {"compression": c}) for kind, c in given.items()}


@hypothesis_settings(max_examples=40)
@given(st.sampled_from(sorted(PACKED)), st.integers(0, 2**32), st.integers(1, 200))
def test_error_feedback_makes_up_for_what_was_lost(
    configs: Mapping[str, RunConfig], kind: str, seed: int, size: int
) -> None:
    """After any number of rounds all that was sent is all that was to be sent, but for what is still kept."""
    stream = np.random.default_rng(seed)
    memory: dict[str, Tensor] = {}
    wanted = sent = np.zeros(size)
    for _ in range(30):
        change = stream.normal(0.3, 1, size).astype(np.float32)
        out = protect(configs[kind], payload(np.zeros(size)), payload(change), memory, "bank")
        assert out.packed is not None
        wanted, sent = wanted + change, sent + out.payload.vector
        np.testing.assert_allclose(memory[RESIDUAL].numpy(), wanted - sent, atol=1e-3)
    if kind != "top_k":  # what is kept is one round's rounding; top-k waits until a value is among the largest
        assert np.abs(wanted - sent).max() < {"fp16": 0.01, "int8": 0.05}[kind]
    else:
        assert np.abs(wanted - sent).max() < 30 * 1.3 + 5


@pytest.mark.parametrize(("kind", "fraction"), [("int4", 1.0), ("top_k_sign", 0.5), ("top_k_int4", 0.2)])
def test_feedback_with_few_bits_brings_everything_in_the_end(recipe: Recipe, kind: str, fraction: float) -> None:
    """Of a change that is the same in 200 rounds, the mean of what arrives is off by what is kept over 200."""
    config = recipe(f"compression.kind={kind}", f"compression.fraction={fraction}", "compression.block=32")
    change, memory = np.random.default_rng(0).normal(size=300).astype(np.float32), dict[str, Tensor]()
    start, arrived = payload(np.zeros(300)), np.zeros(300)
    for _ in range(200):
        arrived += protect(config, start, payload(change), memory, "bank").payload.vector
    np.testing.assert_allclose(arrived + memory[RESIDUAL].numpy(), 200 * change, atol=0.05)
    assert np.abs(arrived / 200 - change).max() < 0.25
    once = protect(config, start, payload(change), {}, "bank").payload.vector
    assert np.abs(once - change).max() > 0.05


def test_feedback_that_decays_by_hand(recipe: Recipe) -> None:
    """Of [4, 3, 0, 0] one of four values is sent: 4; then half of the 3 that was left counts with the next 3."""
    config = recipe("compression.kind=top_k", "compression.fraction=0.25", "compression.feedback_decay=0.5")
    memory, start = dict[str, Tensor](), payload(np.zeros(4))
    sent = [protect(config, start, payload([4, 3, 0, 0]), memory, "bank").payload.vector.tolist() for _ in range(2)]
    assert sent == [[4, 0, 0, 0], [0, 4.5, 0, 0]]
    assert memory[RESIDUAL].tolist() == [4, 0, 0, 0]


def test_without_feedback_the_error_stays(configs: Mapping[str, RunConfig]) -> None:
    with_it = configs["top_k"]
    packing = with_it.compression.model_copy(update={"error_feedback": False})
    without = with_it.model_copy(update={"compression": packing})
    change = payload(np.append(np.ones(2), np.full(18, 0.5)))
    for config, reaches in ((with_it, True), (without, False)):
        memory: dict[str, Tensor] = {}
        sent = [protect(config, payload(np.zeros(20)), change, memory, "bank").payload.vector for _ in range(20)]
        assert bool(np.min(np.sum(sent, axis=0)) > 0) is reaches
        assert (RESIDUAL in memory) is reaches


def test_nothing_is_done_where_nothing_is_set(recipe: Recipe) -> None:
    trained, memory = payload([1, 2]), dict[str, Tensor]()
    out = protect(recipe("privacy.noise=central"), payload([0, 0]), trained, memory, "bank")
    assert out.payload is trained
    assert (out.packed, out.hidden, memory) == (None, (), {})


@pytest.mark.parametrize("setting", ["privacy.noise=local", "compression.kind=fp16"])
def test_what_does_not_fit_what_was_sent_is_refused(recipe: Recipe, setting: str) -> None:
    with pytest.raises(FederationError, match="bank sent w as"):
        protect(recipe(setting), payload([0, 0]), payload([1, 2, 3]), {}, "bank")
    empty = Payload.empty()
    assert protect(recipe(setting), empty, empty, {}, "bank").payload is empty


def test_an_update_that_is_not_finite_goes_bare_and_spoils_no_memory(recipe: Recipe) -> None:
    memory = {RESIDUAL: torch.ones(3)}
    out = protect(recipe("compression.kind=int8"), payload([0, 0, 0]), payload([1, np.nan, np.inf]), memory, "bank")
    assert out.packed is None
    assert np.isfinite(out.payload.vector).tolist() == [True, False, False]
    assert memory[RESIDUAL].tolist() == [1, 1, 1]


def test_noise_comes_before_packing(recipe: Recipe) -> None:
    """What is packed is already noised, and what packing loses is of the noised update: it tells nothing more."""
    size, noise = 50_000, ("privacy.noise=local", "privacy.clip=0.5", "privacy.noise_multiplier=2")
    config = recipe(*noise, "compression.kind=int8")
    memory: dict[str, Tensor] = {}
    trained = payload(np.full(size, 3.0))
    out = protect(config, payload(np.full(size, 2.0)), trained, memory, "bank")
    change = out.payload.vector - 2
    assert out.packed is not None
    assert abs(change.std() - 1) < 0.03
    assert abs(change.mean() - 0.5 / size**0.5) < 6 / size**0.5
    assert memory[RESIDUAL].abs().max() < 0.05
    assert [v.tobytes() for v in out.hidden] == [trained.vector.tobytes()]


def test_what_little_noise_hides_is_the_clipped_update(recipe: Recipe) -> None:
    config = recipe("privacy.noise=local", "privacy.clip=0.5", "privacy.noise_multiplier=1e-6")
    out = protect(config, payload([1, 1]), payload([4, -3]), {}, "bank")
    np.testing.assert_allclose(out.payload.vector, [1.3, 0.6], atol=1e-5)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[list[Update]]:
    """Return a list that gets every round's updates as they reach the method."""
    seen: list[list[Update]] = []
    aggregate = Method.aggregate

    def note(self: Method, server: Server, updates: Any) -> None:
        seen.append(list(updates))
        aggregate(self, server, iter(seen[-1]))

    monkeypatch.setattr(Method, "aggregate", note)
    return seen


@pytest.mark.parametrize("method", ["flex", "fedadam"])
def test_packed_runs_send_less_and_end_near(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes, ends = {}, {}
    for name, packing in {"none": (), **PACKED}.items():
        config = recipe(f"method.name={method}", "training.lr=0.01", *packing, *SHORT)
        seen = watch(monkeypatch)
        summary = run_federation(config, tmp_path / name)
        monkeypatch.undo()
        logs = rounds(tmp_path / name)
        sizes[name] = summary["bytes"]["uplink_per_client_per_round"]
        ends[name] = load_server(tmp_path / name / "checkpoint.safetensors").shared.vector
        declared = logs[0]["declared"]["uplink"]["clinic"]
        assert [[u.client for u in updates] for updates in seen] == [CLIENTS] * 2
        assert summary["bytes"]["personal_sent"] == 0
        assert declared == 4 * ends[name].size  # what the method declares is not packed
        assert sum(logs[0]["groups"]["uplink"]["clinic"].values()) == declared
        kept, _ = load_personal(tmp_path / name / "personal" / "clinic.safetensors")
        assert (f"memory.{RESIDUAL}" in kept) is (name != "none")
        assert logs[0]["clients"]["clinic"]["loss"] > 0
    values = ends["none"].size
    for name, per_value in (("fp16", 2), ("int8", 1 + 4 / 256), ("top_k", 0.1 * 6)):
        assert sizes[name] == pytest.approx(sizes["none"] - values * (4 - per_value), abs=700)
    start = load_start(recipe, tmp_path, method)
    moved = np.linalg.norm(ends["none"] - start)
    for name, near in (("fp16", 0.02), ("int8", 0.2), ("top_k", 1.0)):
        assert 0 < np.linalg.norm(ends[name] - ends["none"]) < near * moved, name


def load_start(recipe: Recipe, tmp_path: Path, method: str) -> Vector:
    class First(Observer):
        def stage(self, text: str) -> None:
            if text.startswith("round 1"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(recipe(f"method.name={method}", *SHORT), tmp_path / "start", First())
    return load_server(tmp_path / "start" / "checkpoint.safetensors").shared.vector


class AfterRound(Observer):
    """Breaks the run off when a round is written down, or when a client trains in it."""

    def __init__(self, number: int, client: str | None = None) -> None:
        self.number, self.client = number, client

    def round(self, record: Mapping[str, Any]) -> None:
        if self.client is None and record["number"] == self.number:
            raise KeyboardInterrupt

    def progress(self, task: str, done: int, total: int) -> None:
        if task == f"{self.client}: round {self.number}":
            raise KeyboardInterrupt


def kept(folder: Path) -> dict[str, bytes]:
    wanted = ("checkpoint.safetensors", "personal/*", "personal/before/*", "shared/*", "predictions/*")
    return {str(p.relative_to(folder)): p.read_bytes() for w in wanted for p in folder.glob(w) if p.is_file()}


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_a_resumed_run_goes_on_with_what_packing_had_lost(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    config = recipe(*PACKED[kind], "method.name=fedavg", "training.local_steps=1", *SHORT)
    run_federation(config, tmp_path / "straight")
    expected = kept(tmp_path / "straight")
    assert len(expected) >= 11
    for name, observer in {"after": AfterRound(1), "within": AfterRound(2, "law_firm")}.items():
        with pytest.raises(KeyboardInterrupt):
            run_federation(config, tmp_path / name, observer)
        run_federation(config, tmp_path / name, resume=True)
        assert kept(tmp_path / name) == expected


def test_the_robust_rules_run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in ("median", "trimmed_mean", "krum"):
        seen = watch(monkeypatch)
        config = recipe(f"federation.aggregation={rule}", "training.lr=0.01", *SHORT)
        summary = run_federation(config, tmp_path / rule)
        monkeypatch.undo()
        assert [[u.client for u in updates] for updates in seen] == [["all"]] * 2
        assert [[u.rows for u in updates] for updates in seen] == [[32]] * 2
        assert sorted(summary["clients"]) == CLIENTS
        assert list(rounds(tmp_path / rule)[0]["clients"]) == CLIENTS
        shared = load_server(tmp_path / rule / "checkpoint.safetensors").shared.vector
        np.testing.assert_allclose(shared, seen[-1][0].vector, rtol=1e-6)


class StopsBeforeScores(Observer):
    """Ends a run as a kill would, when its weights are about to be sent for scoring."""

    def phase(self, name: str, clients: int, round_number: int, rounds: int) -> None:
        if name == "evaluation":
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["flex", "fedavg", "fedadam"])
def test_a_mean_is_noised_once(recipe: Recipe, tmp_path: Path, method: str) -> None:
    """A second one with other noise would tell more than the epsilon that is counted."""
    options = (f"method.name={method}", "federation.rounds=1", "privacy.noise=central", "privacy.clip=0.2", *SHORT)
    config, out = recipe(*options), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_federation(config, out, StopsBeforeScores())
    found = kept_round(out / "noised-mean.safetensors", 1)
    assert found is not None
    log, noised, _ = found
    stages = Stages()
    summary = run_federation(config, out, stages, resume=True)
    assert "training" not in stages.phases
    assert "evaluation" in stages.phases
    if method != "fedadam":  # whose server moves by a step of its own
        np.testing.assert_array_equal(load_server(out / "checkpoint.safetensors").shared.vector, noised.numpy())
    assert not (out / "noised-mean.safetensors").exists()
    assert summary["privacy"] == privacy_spent(config, 1)
    assert list(rounds(out)[0]["clients"]) == list(log.clients) == CLIENTS


class Stages(Observer):
    """Remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str, clients: int, round_number: int, rounds: int) -> None:
        self.phases.append(name)


@pytest.mark.parametrize("noise", ["central", "local"])
def test_noised_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], noise: str
) -> None:
    """Two runs of one recipe differ: nothing that is seeded hides anybody."""
    config = recipe(f"privacy.noise={noise}", "privacy.clip=0.2", "privacy.noise_multiplier=0.5", *SHORT)
    ends = []
    for name in "ab":
        seen = watch(monkeypatch)
        display = RunDisplay()
        summary = run_federation(config, tmp_path / name, display)
        display.result(summary, tmp_path / name)
        monkeypatch.undo()
        assert [[u.client for u in updates] for updates in seen] == [["all"]] * 2
        start = load_start(recipe, tmp_path / f"start {name}", "flex") if name == "a" else None
        ends.append(load_server(tmp_path / name / "checkpoint.safetensors").shared.vector)
        if start is not None:
            std = 0.1 / (4 if noise == "central" else 2)  # four clients count once: n or its root below the line
            change = seen[0][0].vector - start
            assert abs(change.std() / std - 1) < 0.25
    assert not np.array_equal(*ends)
    log, last = rounds(tmp_path / "a")
    assert log["privacy"] == privacy_spent(config, 1)
    assert last["privacy"] == summary["privacy"] == privacy_spent(config, 2)
    told = {"steps", "rows", "shared_parameters", "personal_parameters"}
    for measures in log["clients"].values():
        assert set(measures) == told | ({"loss", "tokens"} if noise == "central" else set())
        assert measures["rows"] == 8
    assert ("loss/mean" in scalars(log)) is (noise == "central")
    shown = " ".join(capsys.readouterr().out.split())
    assert ("mean loss" in shown) is (noise == "central")
    assert f"epsilon {summary['privacy']['epsilon']:.2f} at delta 1e-05" in shown
