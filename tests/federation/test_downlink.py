"""The packed downlink: clients rebuild the server's bits from differences, miss rounds, lose their copy, resume."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flexperts.client.answer import answer
from flexperts.client.copy import with_weights
from flexperts.communication.compression import pack, unpack
from flexperts.communication.messages import (
    LACKS_COPY,
    VERSIONS,
    difference_records,
    differences_of,
    info_of,
    payload_of,
    records,
)
from flexperts.communication.schema import MOST_VERSIONS
from flexperts.communication.traffic import encoded_bytes
from flexperts.communication.versions import Versions, size_of
from flexperts.config.federation import CompressionConfig
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, FederationError
from flexperts.methods.kit.method import Method
from flexperts.methods.registry import make_method, method_class, method_names
from flexperts.observer import Observer
from flexperts.parameters.vector import Manifest, Payload
from flexperts.protection.pipeline import check_protections
from flexperts.server.checkpoint import load_server, save_server
from flexperts.testing import METHOD_SETTINGS

from .scripted_grid import START, ScriptedGrid, Silo, drop, run_on

Recipe = Callable[..., RunConfig]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "training.local_steps=1", "lora.rank=64")
KINDS = ["fp16", "int8", "int4", "top_k_int4"]


def payload(values: Any) -> Payload:
    vector = np.asarray(values, dtype=np.float32)
    return Payload(Manifest(("w",), (vector.shape,)), vector)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def kept(folder: Path) -> dict[str, bytes]:
    wanted = ("checkpoint.safetensors", "personal/*", "copies/**/*", "shared/*", "predictions/*")
    return {str(p.relative_to(folder)): p.read_bytes() for w in wanted for p in folder.glob(w) if p.is_file()}


def settings(kind: str, **given_: Any) -> CompressionConfig:
    return CompressionConfig(kind=kind, **given_)


# The versions alone.


@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.integers(1, 9000), st.integers(1, 6))
def test_a_chain_leads_to_the_servers_bits_from_every_kept_version(
    kind: str, seed: int, size: int, count: int
) -> None:
    stream, chosen = np.random.default_rng(seed), settings(kind, block=16)
    server = payload(stream.normal(size=size))
    versions, every = Versions([server.digest()]), [server]
    for _ in range(count):
        after = Payload(server.manifest, server.vector + stream.normal(0, 0.1, size).astype(np.float32))
        server = versions.add(server, after, chosen)
        every.append(server)
    assert versions.digests == [one.digest() for one in every[versions.first :]]
    for number, old in enumerate(every):
        versions.held["bank"] = number
        found = versions.since("bank")
        if number < versions.first:
            assert found is None
            continue
        assert found is not None
        vector = old.vector
        for packed in found[1]:
            vector = vector + unpack(packed, size, chosen, "server")
        assert vector.tobytes() == server.vector.tobytes()


def test_what_the_downlink_loses_comes_with_the_next_version() -> None:
    """By hand: the way to 0.9 and 10 in int4 steps of 10/7 is rounded to 10/7 and 10; -0.53 is left."""
    versions, start = Versions(["first"]), payload([0, 0])
    chosen = settings("int4", block=2)
    step = float(np.float16(10 / 7 * 2**11)) / 2**11  # the scale as it is sent: 10 is below 2^4, and 4 - 15 = -11
    one = versions.add(start, payload([0.9, 10]), chosen)
    np.testing.assert_allclose(one.vector, [step, 7 * step], rtol=1e-6)
    np.testing.assert_allclose(versions.residual, [0.9 - step, 10 - 7 * step], atol=1e-6)
    two = versions.add(one, one, chosen)  # nothing was trained: the difference is what was left
    np.testing.assert_allclose(two.vector[0], 0.9, atol=0.04)
    halved = Versions(["first"], residual=np.array([1, -1], np.float32))
    moved = halved.add(start, start, settings("fp16", feedback_decay=0.5))
    assert moved.vector.tolist() == [0.5, -0.5]
    without = Versions(["first"])
    without.add(start, payload([0.9, 10]), settings("int4", block=2, error_feedback=False))
    assert without.residual.size == 0


def test_old_versions_go_when_all_weights_are_less() -> None:
    """int8 of 9,000 values in blocks of 9,000 has 9,004 bytes, and its wrapping: three are below 36,000."""
    versions, now = Versions(["0"]), payload(np.zeros(9000))
    for number in range(1, 6):
        now = versions.add(now, payload(np.full(9000, number)), settings("int8", block=9000))
    assert (versions.first, versions.newest, len(versions.digests)) == (2, 5, 4)
    assert 3 * 10_000 < sum(map(size_of, versions.differences)) < 36_000
    assert versions.since("bank") is None  # it may have version 0
    versions.held["bank"] = 5
    assert versions.since("bank") == (versions.digests[-1:], [])
    versions.restart(now)
    assert versions.since("bank") is None
    assert (versions.first, versions.newest, versions.differences) == (6, 6, [])


def test_a_chain_is_less_than_all_weights_in_the_message() -> None:
    """Also where what wraps a difference is more than its values."""
    assume_identity(1)
    chosen, stream = settings("top_k_sign", fraction=0.002), np.random.default_rng(0)
    now = payload(stream.normal(size=20_000))
    versions = Versions([now.digest()])
    for _ in range(60):
        now = versions.add(now, payload(now.vector + stream.normal(size=20_000).astype(np.float32)), chosen)
    versions.held["bank"] = versions.first
    found = versions.since("bank")
    assert found is not None
    assert len(found[1]) > 10
    assert encoded_bytes(difference_records({}, *found)) < encoded_bytes(records({}, payload=now))


def test_a_chain_has_no_more_versions_than_a_silo_reads() -> None:
    assume_identity(1)
    now, chosen = payload(np.arange(1_000_000)), settings("top_k_sign", fraction=1e-5)
    one = pack(now.vector, chosen)
    digests = [f"{number:064x}" for number in range(MOST_VERSIONS)]
    versions = Versions([*digests[1:], now.digest()], differences=[one] * (MOST_VERSIONS - 1))
    versions.add(now, payload(now.vector + 1), chosen)
    assert versions.first == 1
    versions.held["bank"] = 1
    found = versions.since("bank")
    assert found is not None
    assert len(differences_of(difference_records({}, *found), "server")[0]) == MOST_VERSIONS


def test_the_chain_is_in_the_checkpoint(tmp_path: Path) -> None:
    from flexperts.methods.kit.server_state import Server

    for kind in KINDS:
        start = payload(np.arange(3000))
        versions = Versions([start.digest()], held={"bank": 1})
        shared = versions.add(start, payload(np.random.default_rng(0).normal(size=3000)), settings(kind))
        assert len(versions.differences) == 1
        server = Server(shared, {"bank": 3}, versions=versions)
        save_server(tmp_path / "a", server)
        again = load_server(tmp_path / "a")
        save_server(tmp_path / "b", again)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert again.versions is not None
        assert (again.versions.digests, again.versions.held) == (versions.digests, {"bank": 1})
        assert again.versions.residual.tobytes() == versions.residual.tobytes()
        assert again.shared.digest() == versions.digests[-1]


# The message.


def test_a_request_with_differences_comes_back_as_it_was() -> None:
    assume_identity(1)
    packed = [pack(np.arange(9, dtype=np.float32), settings(kind, fraction=0.5)) for kind in ("int4", "top_k_sign")]
    content = difference_records({"round": 3}, ["a" * 64, "b" * 64, "c" * 64], packed)
    digests, found = differences_of(content, "server")
    assert digests == ["a" * 64, "b" * 64, "c" * 64]
    for before, after in zip(packed, found, strict=True):
        assert dict(after.about) == dict(before.about)
        assert {n: a.tobytes() for n, a in after.arrays.items()} == {
            n: a.tobytes() for n, a in before.arrays.items()
        }
    assert info_of(content)["round"] == 3


@pytest.mark.parametrize(
    "told",
    ["", "[]", "{}", '{"digests": [], "about": []}', '{"digests": ["x"], "about": []}',
     json.dumps({"digests": ["a" * 64], "about": [{}]}), json.dumps({"digests": ["a" * 64] * 2, "about": []}),
     json.dumps({"digests": ["a" * 64] * 2, "about": [{"exponent": 0.5}]}), "[" * 10_000],
)  # fmt: skip
def test_a_request_that_is_not_whole_is_refused(told: str) -> None:
    assume_identity(1)
    content = difference_records({}, ["a" * 64, "b" * 64], [pack(np.ones(3, np.float32), settings("int4"))])
    content.config_records["info"]["versions"] = told
    with pytest.raises(FederationError):
        differences_of(content, "server")


# Runs.


def test_each_side_has_the_same_bits_and_little_moves(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("compression.downlink=int4", "federation.rounds=3", "method.name=fedavg", *SHORT)
    received = watch(monkeypatch)
    run_federation(config, tmp_path / "packed")
    server = load_server(tmp_path / "packed" / "checkpoint.safetensors")
    assert server.versions is not None
    assert {payload.digest() for payload in received["evaluate", 3]} == {server.shared.digest()}
    versions = [{payload.digest() for payload in received["train", number]} for number in (1, 2, 3)]
    assert [len(of_a_round) for of_a_round in versions] == [1, 1, 1]
    assert len(set().union(*versions)) == 3
    assert set(server.versions.held.values()) == {3}
    plain = recipe("federation.rounds=3", "method.name=fedavg", *SHORT)
    run_federation(plain, tmp_path / "plain")
    whole, packed = (rounds(tmp_path / name) for name in ("plain", "packed"))
    for number, log in enumerate(packed):
        for name, size in log["downlink"].items():
            share = size / whole[number]["downlink"][name]
            assert share < (0.05 if number == 0 else 0.2), (number, share)
        assert log["declared"] == whole[number]["declared"]
    ends = [load_server(tmp_path / name / "checkpoint.safetensors").shared.vector for name in ("plain", "packed")]
    assert 0 < np.linalg.norm(ends[1] - ends[0]) < 0.05 * np.linalg.norm(ends[0])


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[Payload]]:
    """Return a table that gets the weights of every request as clients use them."""
    from flexperts.client import answer

    seen: dict[tuple[str, int], list[Payload]] = {}
    for kind in ("train", "evaluate"):
        before = answer.ANSWERS[kind]

        def note(content: Any, client: Any, kind: str = kind, before: Any = before) -> Any:
            number = info_of(content)["round"]
            seen.setdefault((kind, number), []).append(payload_of(content, "server"))
            return before(content, client)

        monkeypatch.setitem(answer.ANSWERS, kind, note)
    return seen


class AfterRound(Observer):
    """Breaks the run off when a round is written down, when a client trains in it, or before clients are evaluated.

    Args:
        number: The round.
        client: Who trains.
        evaluated: How many clients are evaluated first; None = it is not broken off there.
    """

    def __init__(self, number: int, client: str | None = None, *, evaluated: int | None = None) -> None:
        self.number, self.client, self.evaluated, self.evaluates = number, client, evaluated, False

    def round(self, record: Mapping[str, Any]) -> None:
        if self.client is None and self.evaluated is None and record["number"] == self.number:
            raise KeyboardInterrupt

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        self.evaluates = self.evaluated is not None and (name, number) == ("evaluation", self.number)
        self._break_off()

    def turn_ended(self, client: str) -> None:
        if self.evaluates and self.evaluated is not None:
            self.evaluated -= 1
        self._break_off()

    def _break_off(self) -> None:
        if self.evaluates and self.evaluated == 0:
            raise KeyboardInterrupt

    def progress(self, task: str, done: int, total: int) -> None:
        if task == f"{self.client}: round {self.number}":
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["flex", "fedadam"])
def test_a_resumed_run_ends_with_the_same_bits(recipe: Recipe, tmp_path: Path, method: str) -> None:
    both = ("compression.kind=top_k_sign", "compression.fraction=0.5", "compression.downlink=int4")
    config = recipe(f"method.name={method}", "evaluation.every=1", *both, *SHORT)
    run_federation(config, tmp_path / "straight")
    expected = kept(tmp_path / "straight")
    assert len(expected) >= 11
    breaks = {"after": AfterRound(1), "within": AfterRound(2, "law_firm")}
    breaks |= {f"evaluated-{n}-{count}": AfterRound(n, evaluated=count) for n in (1, 2) for count in (0, 3)}
    for name, observer in breaks.items():
        with pytest.raises(KeyboardInterrupt):
            run_federation(config, tmp_path / name, observer)
        run_federation(config, tmp_path / name, resume=True)
        assert kept(tmp_path / name) == expected, name
        sent, straight = (
            [(log["downlink"], log["evaluation"]["downlink"]) for log in rounds(tmp_path / its)]
            for its in (name, "straight")
        )
        assert sent == straight, name


def test_a_client_that_missed_rounds_gets_the_chain(recipe: Recipe, tmp_path: Path) -> None:
    half = ("federation.participation=0.25", "federation.rounds=4", "method.name=fedavg")
    config = recipe("compression.downlink=int8", "evaluation.clients=1", *half, *SHORT)
    run_federation(config, tmp_path / "run")
    logs = rounds(tmp_path / "run")
    held: dict[str, int] = {}
    one = min(size for log in logs for size in log["downlink"].values() if size > 10_000)
    for log in logs:
        for name, size in log["downlink"].items():
            missing = log["number"] - 1 - held.get(name, 0)
            assert round(size / one) == missing if missing < 4 else size > 3 * one
            held[name] = log["number"] - 1
    assert max(round(size / one) for log in logs for size in log["downlink"].values()) > 1


class Meddling(Observer):
    """Does something to the folder when a round begins."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act, self.stages = number, act, list[str]()

    def stage(self, text: str) -> None:
        self.stages.append(text)
        if text.startswith(f"round {self.number} of"):
            self.act()


@pytest.mark.parametrize("fault", ["gone", "another", "damaged"])
def test_a_client_without_its_copy_gets_all_weights(recipe: Recipe, tmp_path: Path, fault: str) -> None:
    config = recipe("compression.downlink=int8", "federation.rounds=3", "method.name=fedavg", *SHORT)
    run_federation(config, tmp_path / "straight")
    folder = tmp_path / "run"

    def spoil() -> None:
        path = folder / "copies" / "help_desk.safetensors"
        if fault == "gone":
            path.unlink()
        elif fault == "damaged":
            path.write_bytes(path.read_bytes()[:-4])
        else:
            shutil.copy(tmp_path / "straight" / "copies" / "shop.safetensors", path)  # of a later round

    observer = Meddling(3, spoil)
    run_federation(config, folder, observer)
    assert "all weights again: help_desk" in observer.stages
    assert kept(folder) == kept(tmp_path / "straight")
    log, straight = rounds(folder)[2], rounds(tmp_path / "straight")[2]
    assert log["downlink"]["help_desk"] > 4 * straight["downlink"]["help_desk"]
    assert log["downlink"]["clinic"] == straight["downlink"]["clinic"]
    assert log["clients"] == straight["clients"]


def test_a_copy_that_is_rebuilt_to_other_bits_is_not_used(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as on a machine whose fp32 sums differ: all weights come, and the run ends as without packing faults."""
    from flexperts.client import copy

    config = recipe("compression.downlink=int8", "method.name=fedavg", "evaluation.every=1", *SHORT)
    run_federation(config, tmp_path / "straight")
    monkeypatch.setattr(copy, "unpack", lambda *args: unpack(*args) * np.float32(1 + 1e-6))
    observer = Meddling(0, lambda: None)
    run_federation(config, tmp_path / "run", observer)
    assert any(stage.startswith("all weights again: clinic, help_desk") for stage in observer.stages)
    assert kept(tmp_path / "run") == kept(tmp_path / "straight")


def test_a_request_that_is_refused_replaces_no_copy(recipe: Recipe, tmp_path: Path) -> None:
    """A server could push out the copies of its silos, or fill their disks, by rounds that a run does not have."""

    class Client:
        config = recipe("compression.downlink=int4")
        folder, name, last_round, observer = tmp_path, "clinic", 2, Observer()

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")}

    whole = with_weights("train", _train(1, START), Client())  # type: ignore[arg-type]
    assert whole is not None
    assert not files()
    whole[1]()
    before = files()
    assert len(before) == 1
    with pytest.raises(FederationError, match="this run has rounds 1 to 2"):
        answer("train", _train(10**6, payload([1.0] * 9)), Client())  # type: ignore[arg-type]
    assert files() == before


def _train(number: int, sent: Payload) -> RecordDict:
    return records({"run": "r", "round": number, "agreement": "null"}, payload=sent)


class Forgetful(Silo):
    """A silo that lacks every version."""

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        lacks = VERSIONS in info_of(content)
        return records({"client": self.name, "error": LACKS_COPY}) if lacks else super().answer(kind, content)


def test_all_weights_come_within_the_deadline(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for them just before it, and says nothing after that, is missing."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(ScriptedGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            now[0] += 40 if timeout == 50 else 0
            return super().send_and_receive(messages, timeout=timeout)

    grid = Slow(Forgetful("a", 3), Forgetful("b", 5), Silo("c", 7))
    grid.faults["train", 1, "a"] = lambda request, reply: [reply] if VERSIONS in info_of(request.content) else []
    grid.faults["train", 1, "c"] = drop
    options = ("compression.downlink=int8", "federation.deadline=50", "federation.quorum=0.3")
    config = recipe("method.name=fedavg", "federation.rounds=1", *options)
    _, [log] = run_on(grid, config, tmp_path / "run")
    assert (list(log["clients"]), log["missing"], log["refused"]) == (["b"], ["a", "c"], {})
    assert grid.timeouts[-3:] == [50, 10, 50]


@pytest.mark.parametrize("setting", ["privacy.aggregation=secure", "privacy.noise=central"])
def test_it_works_below_other_defences(recipe: Recipe, tmp_path: Path, setting: str) -> None:
    """Masked sums and noise are added to the version that clients have."""
    config = recipe("compression.downlink=int4", setting, "privacy.clip=0.1", "method.name=fedavg", *SHORT)
    run_federation(config, tmp_path / "run")
    server = load_server(tmp_path / "run" / "checkpoint.safetensors")
    assert server.versions is not None
    assert server.versions.held == dict.fromkeys(server.clients, 2)
    assert server.shared.digest() == server.versions.digests[-1]
    assert all(not log["refused"] for log in rounds(tmp_path / "run"))


# What is refused.


@pytest.mark.parametrize("name", method_names())
def test_methods_whose_clients_get_different_weights_are_refused_by_name(recipe: Recipe, name: str) -> None:
    config = recipe(f"method.name={name}", *METHOD_SETTINGS.get(name, ()), "compression.downlink=int8")
    own = method_class(name)
    if own.broadcast is Method.broadcast and own.final is Method.final:
        check_protections(make_method(config.method), config)
        return
    with pytest.raises(ConfigError, match=f"compression.downlink = 'int8' with method '{name}'"):
        check_protections(make_method(config.method), config)


def test_what_a_recipe_without_the_setting_does_with_differences(recipe: Recipe, tmp_path: Path) -> None:
    class Silent:
        config, folder, name = recipe(), tmp_path, "clinic"

    assume_identity(1)
    content = difference_records({"round": 1}, ["a" * 64], [])
    for kind in ("train", "query.join"):
        whole = with_weights(kind, content, Silent())  # type: ignore[arg-type]
        assert whole is not None
        assert whole[0] is content
