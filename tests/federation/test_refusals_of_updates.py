"""Bad updates are refused by name and reason, and a round comes out as if only the good ones had been sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from rich.console import Console

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Update, records
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.hetlora import HetLoRA
from flexperts.methods.kit.server_state import Server
from flexperts.methods.local import Local
from flexperts.parameters.vector import Manifest, Payload
from flexperts.server.admission import Admission, root_mean_square
from flexperts.server.checkpoint import load_server
from flexperts.server.round_log import RoundLog
from flexperts.terminal.display import RunDisplay

from .scripted_grid import (
    START,
    Fault,
    ScriptedGrid,
    Silo,
    Watch,
    answered,
    changed,
    dead,
    drop,
    expected,
    run_on,
    unreachable,
)

Recipe = Callable[..., RunConfig]
THREE = ("method.name=fedavg", "federation.rounds=3", "federation.deadline=50", "federation.max_share=1")
"""One silo has most rows, and the means below are by rows alone."""


def silos() -> list[Silo]:
    return [Silo("a", 3), Silo("b", 50), Silo("c", 7)]


def values(change: Callable[[np.ndarray[Any, Any]], Any]) -> Fault:
    """Return a fault that changes the payload's vector."""
    return changed(payload=lambda sent: replace(sent, vector=np.asarray(change(sent.vector), dtype=np.float32)))


def tensors(**named: torch.Tensor) -> Fault:
    return changed(payload=lambda sent: Payload.of({n.replace("__", "."): t for n, t in named.items()}))


def put(place: int, value: float) -> Callable[[np.ndarray[Any, Any]], Any]:
    def change(vector: np.ndarray[Any, Any]) -> Any:
        return np.where(np.arange(vector.size) == place, value, vector)

    return change


def of_float64(request: Message, reply: Message) -> list[Message]:
    content = reply.content
    array = content.array_records["shared"]["shared"].numpy()
    content["shared"] = ArrayRecord({"shared": Array(array.astype(np.float64))})
    return [reply]


def unreadable(request: Message, reply: Message) -> list[Message]:
    array = reply.content.array_records["shared"]["shared"]
    array.data = array.data[:20]
    return [reply]


def second_array(request: Message, reply: Message) -> list[Message]:
    reply.content["more"] = ArrayRecord({"x": Array(np.zeros(2, dtype=np.float32))})
    return [reply]


def no_manifest(request: Message, reply: Message) -> list[Message]:
    reply.content.config_records["info"]["manifest"] = b"x"
    return [reply]


FAULTS: dict[str, tuple[Fault, str]] = {
    "nan": (values(put(3, float("nan"))), "1 values not finite"),
    "infinity": (values(put(0, float("-inf"))), "1 values not finite"),
    "shape": (tensors(**{n: torch.zeros(3, 2) for n in START.manifest.names}), "is expected"),
    "keys": (tensors(other=torch.zeros(12)), "is expected"),
    "nothing": (changed(without=["shared"]), "is expected"),
    "float64": (of_float64, "float64"),
    "cut array": (unreadable, "cannot be read"),
    "second array": (second_array, "must contain exactly one payload"),
    "manifest": (no_manifest, "without a readable manifest"),
    "round before": (changed(info={"round": 1}), "b answers to round 1: this is round 2"),
    "round to come": (changed(info={"round": 3}), "b answers to round 3: this is round 2"),
    "round as text": (changed(info={"round": "2"}), "b reports round = '2': it must be a whole number"),
    "base": (changed(info={"base": "0ther"}), "b trained the base 0ther"),
    "no base": (changed(without=["base"]), "it cannot be read"),
    "norm": (values(lambda v: v + 100), "federation.max_update_rms = 10"),
    "huge": (values(lambda v: np.full_like(v, 3e38)), "federation.max_update_rms = 10"),
    "name": (changed(info={"client": "a"}), "node of b answers as a"),
    "more rows": (changed(metrics={"rows": 51}), "b counts 51 rows: on joining it reported 50"),
    "no rows": (changed(metrics={"rows": 0}), "b counts 0 rows"),
    "negative rows": (changed(metrics={"rows": -50}), "b counts -50 rows"),
    "half a row": (changed(metrics={"rows": 50.5}), "b counts 50.5 rows"),
    "rows nan": (changed(metrics={"rows": float("nan")}), "b reports rows = nan"),
    "loss nan": (changed(metrics={"loss": float("nan")}), "b reports loss = nan"),
    "list": (changed(metrics={"loss": [1.0]}), "b reports loss = [1.0]"),
    "personal bytes": (changed(metrics={"personal_sent": 8}), "8 personal bytes"),
    "no count of personal bytes": (changed(without=["personal_sent"]), "personal_sent = None"),
    "no loss": (changed(without=["loss"]), "b reports loss = None"),
    "no metrics": (changed(without=["metrics"]), "it cannot be read"),
    "no info": (changed(without=["info"]), "it cannot be read"),
    "empty": (lambda request, reply: [answered(request, RecordDict())], "it cannot be read"),
    "error": (lambda request, reply: [answered(request, records({"error": "no\nspace"}))], "error: no space"),
    "dead": (dead, "Node Unavailable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_update_is_refused_by_name_and_the_round_is_that_of_the_others(
    recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    fault, said = FAULTS[kind]
    a, b, c = silos()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    grid.faults["train", 2, "b"] = fault
    server, rounds = run_on(grid, recipe(*THREE), tmp_path / "run", watch)
    assert [[*r["refused"]] for r in rounds] == [[], ["b"], []]
    assert said in rounds[1]["refused"]["b"]
    assert watch.refusals == [("b", rounds[1]["refused"]["b"])]
    assert [[*r["clients"]] for r in rounds] == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]
    assert [*rounds[1]["uplink"]] == ["a", "c"]
    assert [r["missing"] for r in rounds] == [[], [], []]
    everyone = (a, b, c)
    assert server.shared.vector.tobytes() == expected([everyone, (a, c), everyone]).tobytes()
    assert sorted(RunDirectory(tmp_path / "run").summary()["clients"]) == ["a", "b", "c"]


def test_a_silo_that_cannot_be_reached_is_missing_and_its_round_is_that_of_the_others(
    recipe: Recipe, tmp_path: Path
) -> None:
    """The SuperLink says so after a minute, long before most deadlines; the silo itself has said nothing wrong."""
    a, b, c = silos()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    grid.faults["train", 2, "b"] = unreachable
    server, rounds = run_on(grid, recipe(*THREE), tmp_path / "run", watch)
    assert [r["missing"] for r in rounds] == [[], ["b"], []]
    assert [r["refused"] for r in rounds] == [{}, {}, {}]
    assert "round 2: b cannot be reached" in watch.notices
    everyone = (a, b, c)
    assert server.shared.vector.tobytes() == expected([everyone, (a, c), everyone]).tobytes()


def test_personal_bytes_are_counted_though_the_update_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*silos())
    grid.faults["train", 2, "b"] = changed(metrics={"personal_sent": 8})
    run_on(grid, recipe(*THREE), tmp_path / "run")
    assert RunDirectory(tmp_path / "run").summary()["bytes"]["personal_sent"] == 8


def test_who_sends_nothing_is_missing(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = silos()
    grid = ScriptedGrid(a, b, c)
    grid.faults["train", 2, "b"] = drop
    server, rounds = run_on(grid, recipe(*THREE), tmp_path / "run")
    assert [r["missing"] for r in rounds] == [[], ["b"], []]
    assert [r["refused"] for r in rounds] == [{}, {}, {}]
    assert [r["participants"] for r in rounds] == [["a", "b", "c"]] * 3
    assert server.shared.vector.tobytes() == expected([(a, b, c), (a, c), (a, b, c)]).tobytes()


def test_every_exchange_has_the_deadline(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*silos())
    run_on(grid, recipe(*THREE), tmp_path / "run")
    assert None not in grid.timeouts
    assert all(0 < t <= 50 for t in grid.timeouts if t is not None)
    assert grid.timeouts.count(50) >= 2 * 3 + 1


def test_the_first_of_two_replies_counts(recipe: Recipe, tmp_path: Path) -> None:
    """The second holds other weights, to see which one was taken."""
    a, b, c = silos()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    other = values(lambda v: v + 1)
    grid.faults["train", 2, "b"] = lambda request, reply: [*other(request, reply), reply]  # the last is first
    server, rounds = run_on(grid, recipe(*THREE), tmp_path / "run", watch)
    assert rounds[1]["refused"].keys() == {"b"}
    assert rounds[1]["refused"]["b"].startswith("duplicate")
    assert [*rounds[1]["clients"]] == ["a", "b", "c"]
    assert server.shared.vector.tobytes() == expected([(a, b, c)] * 3).tobytes()


@pytest.mark.parametrize("last", [True, False])
def test_a_late_reply_is_not_taken_for_the_next_round(recipe: Recipe, tmp_path: Path, last: bool) -> None:
    a, b, c = silos()
    grid = ScriptedGrid(a, b, c)

    def hold(request: Message, reply: Message) -> list[Message]:
        held.append(reply)
        return []

    def deliver(request: Message, reply: Message) -> list[Message]:
        return [*held, reply] if last else [reply, *held]

    held: list[Message] = []
    grid.faults["train", 1, "b"], grid.faults["train", 2, "b"] = hold, deliver
    server, rounds = run_on(grid, recipe(*THREE), tmp_path / "run")
    assert rounds[0]["missing"] == ["b"]
    assert [*rounds[1]["refused"]] == ["b"]
    assert [*rounds[1]["clients"]] == ["a", "b", "c"]
    assert server.shared.vector.tobytes() == expected([(a, c), (a, b, c), (a, b, c)]).tobytes()


def test_a_training_reply_that_comes_with_the_scores_is_no_score(recipe: Recipe, tmp_path: Path) -> None:
    held: list[Message] = []

    def hold(request: Message, reply: Message) -> list[Message]:
        held.append(reply)
        return []

    grid = ScriptedGrid(*silos())
    grid.faults["train", 3, "b"], grid.faults["evaluate", 3, "b"] = hold, lambda request, reply: held
    _, rounds = run_on(grid, recipe(*THREE), tmp_path / "run")
    assert [*rounds[2]["scores"]] == ["a", "c"]
    assert "nll.zero_shot" in rounds[2]["unscored"]["b"]


def test_who_was_not_asked_is_not_heard(recipe: Recipe, tmp_path: Path) -> None:
    """Half of the clients are drawn; a third one sends something as well."""
    grid = ScriptedGrid(Silo("a", 3), Silo("b", 4), Silo("c", 5), Silo("d", 6))
    config = recipe("method.name=fedavg", "federation.participation=0.5", "federation.rounds=1")
    drawn = run_on(ScriptedGrid(*grid.nodes.values()), config, tmp_path / "before")[1][0]["participants"]
    (node, other), *_ = [(n, s) for n, s in grid.nodes.items() if s.name not in drawn]

    def and_another(request: Message, reply: Message) -> list[Message]:
        own = other.answer("train", request.content)
        stray = answered(grid.create_message(request.content, "train", node, "1"), own)
        return [reply, stray]

    grid.faults["train", 1, drawn[0]] = and_another
    server, rounds = run_on(grid, config, tmp_path / "run")
    assert "was not asked" in rounds[0]["refused"][other.name]
    assert [*rounds[0]["clients"]] == drawn
    taking_part = [s for s in grid.nodes.values() if s.name in drawn]
    assert server.shared.vector.tobytes() == expected([taking_part]).tobytes()


def test_an_unknown_node_is_refused_by_its_number(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*silos())

    def of_a_stranger(request: Message, reply: Message) -> list[Message]:
        stray = grid.create_message(request.content, "train", 999, "1")
        return [reply, answered(stray, reply.content)]

    grid.faults["train", 2, "b"] = of_a_stranger
    _, rounds = run_on(grid, recipe(*THREE), tmp_path / "run")
    assert [*rounds[1]["refused"]] == ["node 999"]


# The quorum.


@pytest.mark.parametrize(
    ("quorum", "bad", "goes_on"),
    [(0.5, 1, True), (0.5, 2, False), (0.34, 1, True), (0.3, 2, True), (1.0, 1, False), (0.01, 3, False)],
)
def test_the_quorum_is_a_share_of_the_participants(
    recipe: Recipe, tmp_path: Path, quorum: float, bad: int, goes_on: bool
) -> None:
    """Of three: 0.5 asks for 2, 0.34 for 2, 0.3 for 1, 1.0 for 3, and the least is 1."""
    grid = ScriptedGrid(*silos())
    for name in "abc"[:bad]:
        grid.faults["train", 1, name] = drop
    config = recipe(*THREE, f"federation.quorum={quorum}")
    if goes_on:
        assert len(run_on(grid, config, tmp_path / "run")[1]) == 3
    else:
        with pytest.raises(FederationError, match=f"federation.quorum = {quorum:g} asks for"):
            run_on(grid, config, tmp_path / "run")


def test_a_missed_quorum_names_everyone_and_leaves_the_round_before(recipe: Recipe, tmp_path: Path) -> None:
    config, everyone = recipe(*THREE), silos()
    grid, out = ScriptedGrid(*everyone), tmp_path / "run"
    kept: list[bytes] = []
    watch = Watch(round_1=lambda: kept.append((out / "checkpoint.safetensors").read_bytes()))
    grid.faults |= {("train", 2, "a"): drop, ("train", 2, "b"): FAULTS["nan"][0]}
    with pytest.raises(FederationError) as caught:
        run_on(grid, config, out, watch)
    said = str(caught.value)
    assert said.startswith("round 2: 1 of 3 clients sent a usable update (a missing, b refused (")
    assert "not finite" in said
    assert "federation.quorum = 0.5 asks for 2; resume the run when the clients are back" in said
    assert (out / "checkpoint.safetensors").read_bytes() == kept[0]
    assert not (out / "summary.json").exists()
    grid.faults.clear()
    server, rounds = run_on(grid, config, out)
    assert server.shared.vector.tobytes() == expected([everyone] * 3).tobytes()
    assert [r["number"] for r in rounds] == [1, 2, 3]
    assert [r["missing"] for r in rounds] == [[], [], []]


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedavgm"])
def test_when_all_are_refused_the_quorum_is_the_error(recipe: Recipe, tmp_path: Path, method: str) -> None:
    grid = ScriptedGrid(*silos())
    for name in "abc":
        grid.faults["train", 1, name] = FAULTS["nan"][0]
    config = recipe(f"method.name={method}", "training.optimizer=sgd", "training.lr=0.5")
    with pytest.raises(FederationError, match="round 1: 0 of 3 clients sent a usable update"):
        run_on(grid, config, tmp_path / "run")
    assert load_server(tmp_path / "run" / "checkpoint.safetensors").round == 0


def test_a_method_that_asks_nobody_has_no_quorum(recipe: Recipe, tmp_path: Path) -> None:
    _, rounds = run_on(ScriptedGrid(*silos()), recipe("method.name=zero_shot"), tmp_path / "run")
    assert [r["participants"] for r in rounds] == [[], []]
    assert sorted(rounds[-1]["scores"]) == ["a", "b", "c"]


# Evaluation.


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (drop, "did not answer in time"),
        (dead, "Node Unavailable"),
        (unreachable, "b cannot be reached"),
        (FAULTS["error"][0], "no space"),
        (changed(info={"round": 2}), "b answers to round 2: this is round 3"),
        (changed(info={"client": "c"}), "answers as c"),
        (changed(without=["nll.global"]), "b reports nll.global = None"),
        (changed(metrics={"rows": 0}), "0 rows"),
        (changed(metrics={"rows": 1.5}), "1.5 rows"),
        (changed(without=["metrics"]), "cannot be read"),
    ],
)
def test_who_has_no_scores_is_named_and_in_no_mean(recipe: Recipe, tmp_path: Path, fault: Fault, said: str) -> None:
    """A silo's score is its number of rows: means are of 3 and 7, not of 50."""
    grid = ScriptedGrid(*silos())
    grid.faults["evaluate", 3, "b"] = fault
    _, rounds = run_on(grid, recipe(*THREE), tmp_path / "run")
    assert [*rounds[2]["scores"]] == ["a", "c"]
    assert [*rounds[2]["unscored"]] == ["b"]
    assert said in rounds[2]["unscored"]["b"]
    summary = RunDirectory(tmp_path / "run").summary()
    assert summary["unscored"] == rounds[2]["unscored"]
    assert sorted(summary["clients"]) == ["a", "c"]
    assert summary["mean"]["nll"]["global"] == 5
    assert [r["unscored"] for r in rounds[:2]] == [{}, {}]


def test_a_last_evaluation_without_any_score_is_an_error_and_can_be_resumed(recipe: Recipe, tmp_path: Path) -> None:
    config, everyone = recipe(*THREE, "evaluation.every=1"), silos()
    grid = ScriptedGrid(*everyone)
    for name in "abc":
        grid.faults["evaluate", 1, name] = grid.faults["evaluate", 3, name] = drop
    with pytest.raises(FederationError, match=r"round 3: no client has scores .*a: it did not answer in time"):
        run_on(grid, config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert [[*r["scores"]] for r in run.rounds()] == [[], ["a", "b", "c"]]
    assert load_server(run.checkpoint).round == 2
    grid.faults.clear()
    server, rounds = run_on(grid, config, tmp_path / "run")
    assert server.shared.vector.tobytes() == expected([everyone] * 3).tobytes()
    assert sorted(rounds[-1]["scores"]) == ["a", "b", "c"]


# Single rules.


def admission(config: RunConfig, method: Any, **server: Any) -> Admission:
    return Admission(method, config, Server(**({"shared": START, "clients": {"b": 50}} | server)))


def reply(info: dict[str, Any] | None = None, payload: Payload = START) -> RecordDict:
    sizes = {"shared_parameters": 12, "personal_parameters": 0, "personal_sent": 0}
    metrics = {"loss": 1.0, "steps": 1, "tokens": 1, "rows": 50, **sizes}
    return records({"client": "b", "round": 1, "base": "x", **(info or {})}, metrics, payload)


def test_without_a_known_base_any_is_taken(recipe: Recipe) -> None:
    assert admission(recipe(), Local()).server.base == ""
    assert admission(recipe(), FedAvg()).update("b", reply()).client == "b"
    with pytest.raises(FederationError, match="base"):
        admission(recipe(), FedAvg(), base="y").update("b", reply())


def test_how_far_an_update_went_is_measured_in_float64() -> None:
    vector = np.array([3e38, -3e38, 0, 0], dtype=np.float32)
    assert root_mean_square(vector, -vector) == pytest.approx(6e38 / 2**0.5)
    assert root_mean_square(np.array([3, 4], dtype=np.float32)) == pytest.approx(12.5**0.5)
    assert root_mean_square(np.zeros(0, dtype=np.float32)) == 0
    long = np.ones(3_000_000, dtype=np.float32)
    long[2_500_000] = 4
    assert root_mean_square(long, np.ones_like(long)) == pytest.approx((9 / 3e6) ** 0.5)


@pytest.mark.parametrize(("start", "step", "taken"), [(100, 9.99, True), (100, 10.01, False), (0, 9.99, True)])
def test_near_a_start_that_is_large_an_update_is_measured_from_it(
    recipe: Recipe, start: float, step: float, taken: bool
) -> None:
    """The quick look at the values alone cannot tell here, and must not decide."""
    sent = replace(START, vector=np.full_like(START.vector, start))
    content = reply(payload=replace(sent, vector=sent.vector + np.float32(step)))
    judge = admission(recipe("federation.max_update_rms=10"), FedAvg(), shared=sent)
    if taken:
        assert judge.update("b", content).client == "b"
    else:
        with pytest.raises(FederationError, match=r"federation\.max_update_rms = 10"):
            judge.update("b", content)


def test_the_quick_look_knows_each_round_s_start(recipe: Recipe) -> None:
    judge = admission(recipe("federation.max_update_rms=10"), FedAvg())
    assert judge.update("b", reply()).client == "b"
    judge.server.shared = replace(START, vector=np.full_like(START.vector, 100))
    with pytest.raises(FederationError, match=r"federation\.max_update_rms = 10"):
        judge.update("b", reply())


def test_where_replies_are_no_trained_weights_the_values_count(recipe: Recipe) -> None:
    """They are not to be compared with the shared weights, which have another size."""

    class Three(Local):
        def uplink(self, server: Server, client: str) -> Manifest:
            return Manifest(("derived.x",), ((3,),))

    sent = Payload.of({"derived.x": torch.tensor([10.0, 10.0, 10.0])})
    assert admission(recipe(), Three()).update("b", reply(payload=sent)).rows == 50
    with pytest.raises(FederationError, match=r"root mean square of the update 10\.\d"):
        admission(recipe(), Three()).update("b", reply(payload=Payload(sent.manifest, sent.vector * 1.01)))


def test_trained_weights_are_measured_from_those_that_were_sent(recipe: Recipe) -> None:
    """Weights of 100 that moved by 9 are fine, and by 11 too far."""
    from flexperts.methods.fedavg import FedAvg

    shared = Payload(START.manifest, np.full_like(START.vector, 100))
    gate = admission(recipe(), FedAvg(), shared=shared)
    assert gate.update("b", reply(payload=Payload(shared.manifest, shared.vector + 9))).rows == 50
    with pytest.raises(FederationError, match="root mean square of the update 11"):
        gate.update("b", reply(payload=Payload(shared.manifest, shared.vector - 11)))


@pytest.mark.parametrize(("told", "taken"), [(1.0, True), (2.0, True), (0.0, False), (3.0, False), (1.5, False)])
def test_a_method_refuses_values_of_its_own(recipe: Recipe, told: float, taken: bool) -> None:
    """HetLoRA's client can go on with a rank from 1 to the one it had."""
    sent = Payload.of(START.tensors() | {"derived.rank": torch.tensor([told])})
    gate = admission(recipe(), HetLoRA())
    assert gate.method.uplink(gate.server, "b") == sent.manifest
    if taken:
        assert gate.update("b", reply(payload=sent)).client == "b"
    else:
        with pytest.raises(FederationError, match="reports the next rank"):
            gate.update("b", reply(payload=sent))


def test_under_local_noise_no_loss_is_asked_for(recipe: Recipe) -> None:
    from flexperts.methods.fedavg import FedAvg

    content = reply()
    del content.metric_records["metrics"]["loss"], content.metric_records["metrics"]["tokens"]
    found: Update = admission(recipe("privacy.noise=local"), FedAvg()).update("b", content)
    assert "loss" not in found.metrics
    with pytest.raises(FederationError, match="loss = None"):
        admission(recipe(), FedAvg()).update("b", content)


def test_the_terminal_shows_who_is_refused_missing_and_without_scores(recipe: Recipe, tmp_path: Path) -> None:
    grid, text = ScriptedGrid(*silos(), Silo("d", 9)), StringIO()
    grid.faults |= {
        ("train", 2, "b"): changed(metrics={"loss": [1.0]}),  # brackets are no markup
        ("train", 2, "c"): drop,
        ("evaluate", 3, "d"): drop,
    }
    display = RunDisplay(Console(file=text, width=200))
    run_on(grid, recipe(*THREE), tmp_path / "run", display)
    display.result(RunDirectory(tmp_path / "run").summary(), tmp_path)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    (refused,) = [line for line in lines if "refused" in line]
    assert refused.startswith("  b refused: b reports loss = [1.0]: it must be a number")
    assert "  missing: c" in lines
    assert "  without scores: d" in lines
    (row,) = [line for line in lines if line.startswith(("│ d", "| d"))]
    assert row.count(" - ") == 2


def test_rounds_that_were_written_before_these_fields_are_read() -> None:
    log = RoundLog(**{"number": 3, "clients": {"a": {"loss": 1.0}}, "scores": {}, "personal_sent": 0})
    assert (log.refused, log.missing, log.unscored, log.participants) == ({}, [], {}, [])
