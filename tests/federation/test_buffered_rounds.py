"""Buffered rounds and steps by time: by hand, on silos that are late, killed and taken up, and on a tiny model."""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flexperts.communication.messages import records
from flexperts.config.run import RunConfig
from flexperts.engines.flower_private import stamp
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import check_settings, run_federation
from flexperts.errors import ConfigError, FederationError
from flexperts.observer import Observer
from flexperts.parameters.vector import Vector
from flexperts.seeding import generator
from flexperts.server import buffered_rounds
from flexperts.server.checkpoint import load_server

from .scripted_grid import (
    START,
    Fault,
    ScriptedGrid,
    Silo,
    Watch,
    changed,
    drop,
    run_on,
    trio,
)

Recipe = Callable[..., RunConfig]
BUFFERED = ("method.name=fedavg", "federation.mode=buffered", "federation.max_share=1")
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "training.local_steps=2")


class SlowGrid(ScriptedGrid):
    """A grid whose replies to train requests come after some looks for them, as from SuperLink."""

    def __init__(self, *silos: Silo, looks: Mapping[str, int] | None = None) -> None:
        super().__init__(*silos)
        self.looks = dict(looks or {})
        self.pushed: dict[str, tuple[int, list[Message]]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(stamp(message))
            name = self.nodes[message.metadata.dst_node_id].name
            self.pushed[ids[-1]] = self.looks.get(name, 0), self._answers(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        [message_id] = message_ids
        left, replies = self.pushed[message_id]
        self.pushed[message_id] = left - 1, replies
        return replies if left <= 0 else []


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only waiting moves; its seconds."""
    now = [0.0]
    monkeypatch.setattr(buffered_rounds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(buffered_rounds.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def mean(shared: Vector, *changes: tuple[Silo, Vector]) -> Vector:
    rows = sum(silo.rows for silo, _ in changes)
    return shared + sum(silo.rows * change for silo, change in changes) / rows


def taking(steps: int, personal: int = 0) -> Fault:
    """A silo with a clock reports so many steps of the shared weights, and others of its own."""
    return changed(metrics={"steps": steps + personal, "shared_steps": steps}, without=("loss", "tokens"))


# By hand.


def test_a_late_change_is_added_to_the_present_weights_and_counts_for_less(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    a, b, c = trio()
    grid = SlowGrid(a, b, c, looks={"c": 2})
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=3")
    server, logs = run_on(grid, config, tmp_path / "run")
    assert [log["participants"] for log in logs] == [["a", "b"], ["a", "b"], ["a", "b", "c"]]
    assert [log["late"] for log in logs] == [{}, {}, {"c": 2}]
    assert [log["missing"] for log in logs] == [[], [], []]
    one = mean(START.vector, (a, a.change(1)), (b, b.change(1)))
    two = mean(one, (a, a.change(2)), (b, b.change(2)))
    three = mean(two, (a, a.change(3)), (b, b.change(3)), (c, c.change(1) * 3**-0.5))
    np.testing.assert_allclose(server.shared.vector, three, rtol=1e-5, atol=1e-6)
    assert np.array_equal(c.received[1], START.vector)


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_staleness_is_the_exponent(recipe: Recipe, tmp_path: Path, time: list[float], exponent: float) -> None:
    a, b = Silo("a", 1), Silo("b", 1)
    config = recipe(*BUFFERED, "federation.buffer=1", "federation.rounds=2", f"federation.staleness={exponent}")
    server, logs = run_on(SlowGrid(a, b, looks={"b": 1}), config, tmp_path / "run")
    assert logs[1]["late"] == {"b": 1}
    one = mean(START.vector, (a, a.change(1)))
    two = mean(one, (a, a.change(2)), (b, b.change(1) * 2**-exponent))
    np.testing.assert_allclose(server.shared.vector, two, rtol=1e-5, atol=1e-6)


def test_changes_count_per_step(recipe: Recipe, tmp_path: Path) -> None:
    """FedNova by hand: 2 and 8 steps, 3 and 5 rows. Steps of the personal weights alone do not count."""
    a, b = Silo("a", 3), Silo("b", 5)
    grid = ScriptedGrid(a, b)
    for name, steps, personal in (("a", 2, 5), ("b", 8, 0)):
        grid.faults["train", 1, name] = taking(steps, personal)
    config = recipe(
        "method.name=fedavg",
        "training.local_seconds=9",
        "training.local_steps=8",
        "federation.rounds=1",
        "federation.max_share=1",
    )
    server, _ = run_on(grid, config, tmp_path / "run")
    effective = (3 * 2 + 5 * 8) / 8
    expected = START.vector + effective * (3 * a.change(1) / 2 + 5 * b.change(1) / 8) / 8
    np.testing.assert_allclose(server.shared.vector, expected, rtol=1e-5, atol=1e-6)


def test_a_silo_that_reports_one_step_is_not_multiplied_without_limit(recipe: Recipe, tmp_path: Path) -> None:
    silos = [Silo(name, 4) for name in "abcd"]
    grid = ScriptedGrid(*silos)
    for name, steps in (("a", 1), ("b", 400), ("c", 400), ("d", 400)):
        grid.faults["train", 1, name] = taking(steps)
    config = recipe("method.name=fedavg", "training.local_seconds=9", "federation.rounds=1")
    _, logs = run_on(grid, config, tmp_path / "run")
    assert list(logs[0]["refused"]) == ["a"]
    assert "max_norm_ratio" in logs[0]["refused"]["a"]


def test_an_update_is_not_multiplied_past_the_largest_size(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    """Of two updates no ratio is judged; the one that is left counts as in a round of its own."""
    a, b = Silo("a", 4), Silo("b", 4)
    grid = SlowGrid(a, b)
    for name, steps in (("a", 1), ("b", 400)):
        grid.faults["train", 1, name] = taking(steps)
    options = ("training.local_seconds=9", "training.local_steps=400", "federation.max_update_rms=3")
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=1", *options)
    server, [log] = run_on(grid, config, tmp_path / "run")
    assert "max_update_rms = 3" in log["refused"]["a"]
    assert "it reports 1 steps of the shared weights" in log["refused"]["a"]
    assert list(log["clients"]) == list(log["uplink"]) == ["b"]
    np.testing.assert_allclose(server.shared.vector, START.vector + b.change(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [100, 2**53])
def test_a_silo_that_reports_many_steps_does_not_multiply_the_changes(
    recipe: Recipe, tmp_path: Path, steps: int
) -> None:
    """At most the recipe's steps count in the mean; its own change is divided by what it reports."""
    silos = [Silo(name, 4) for name in "abcd"]
    grid = ScriptedGrid(*silos)
    for name, its in (("a", steps), ("b", 1), ("c", 1), ("d", 1)):
        grid.faults["train", 1, name] = taking(its)
    config = recipe(
        "method.name=fedavg", "training.local_seconds=9", "training.local_steps=1", "federation.rounds=1"
    )
    server, _ = run_on(grid, config, tmp_path / "run")
    expected = START.vector + (silos[0].change(1) / steps + sum(s.change(1) for s in silos[1:])) / 4
    np.testing.assert_allclose(server.shared.vector, expected, rtol=1e-5, atol=1e-6)


# Silos elsewhere.


def test_who_does_not_answer_in_time_is_missing_and_asked_again(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    a, b, c = trio()
    grid = SlowGrid(a, b, c, looks={"b": 100})
    grid.faults["train", 1, "c"] = drop
    config = recipe(
        *BUFFERED, "federation.buffer=2", "federation.rounds=2", "federation.deadline=50", "federation.quorum=0.3"
    )
    _, logs = run_on(grid, config, tmp_path / "run")
    assert logs[0]["participants"] == ["a", "b", "c"]
    assert logs[0]["missing"] == ["b", "c"]
    assert time[0] >= 50
    assert ("train", "c") in grid.asked[grid.asked.index(("train", "c")) + 1 :]


def test_a_silo_that_trains_is_not_scored_until_the_last_round(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    grid = SlowGrid(*trio(), looks={"c": 100})
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=2", "evaluation.every=1")
    _, logs = run_on(grid, config, tmp_path / "run")
    assert [sorted(log["scores"]) for log in logs] == [["a", "b"], ["a", "b", "c"]]
    assert [log["unscored"] for log in logs] == [{"c": "it is training"}, {}]
    assert grid.asked.count(("evaluate", "c")) == 1


def test_errors_do_not_end_a_round(recipe: Recipe, tmp_path: Path, time: list[float]) -> None:
    a, b, c = trio()
    grid = SlowGrid(a, b, c, looks={"b": 2, "c": 2})
    grid.faults["train", 1, "a"] = lambda request, reply: _error(request)
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=1")
    _, logs = run_on(grid, config, tmp_path / "run")
    assert sorted(logs[0]["clients"]) == ["b", "c"]
    assert list(logs[0]["refused"]) == ["a"]


def _error(request: Message) -> list[Message]:
    from tests.federation.scripted_grid import answered

    return [answered(request, records({"client": "a", "error": "OutOfMemory"}))]


def test_silos_slower_than_the_deadline_do_not_end_a_run(recipe: Recipe, tmp_path: Path, time: list[float]) -> None:
    silos = [Silo(name, 3) for name in "abcdefg"]
    grid = SlowGrid(*silos, looks={**dict.fromkeys("abc", 4), **dict.fromkeys("defg", 10**6)})
    options = ("federation.buffer=3", "federation.rounds=6", "federation.deadline=50")
    _, logs = run_on(grid, recipe(*BUFFERED, *options), tmp_path / "run")
    assert [sorted(log["clients"]) for log in logs] == [["a", "b", "c"]] * 6
    assert any(log["missing"] == ["d", "e", "f", "g"] for log in logs)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("is_error", [True, False])
def test_replies_that_cannot_be_used_do_not_fill_the_buffer(
    recipe: Recipe, tmp_path: Path, time: list[float], count: int, is_error: bool
) -> None:
    grid = SlowGrid(*[Silo(name, 3) for name in "abcdefg"], looks={"c": 1, "d": 1, "e": 9, "f": 9, "g": 9})
    for name in "ab":
        grid.faults["train", 1, name] = (
            (lambda request, reply: _error(request)) if is_error else changed(metrics={"rows": 99})
        )
    config = recipe(*BUFFERED, f"federation.buffer={count}", "federation.rounds=1")
    _, logs = run_on(grid, config, tmp_path / "run")
    assert sorted(logs[0]["clients"]) == ["c", "d"]
    assert sorted(logs[0]["refused"]) == ["a", "b"]


def test_a_refused_update_does_not_fill_the_buffer_in_simulated_time(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = Silo("a", 3), Silo("b", 3), Silo("c", 3)
    a.change = lambda number: np.full(START.size, 99, np.float32)  # type: ignore[method-assign]
    options = ("federation.buffer=2", "federation.rounds=1", "federation.step_seconds={b = 2.0, c = 3.0}")
    _, logs = simulated(recipe(*BUFFERED, *options), tmp_path / "run", [a, b, c])
    assert sorted(logs[0]["clients"]) == ["b", "c"]
    assert logs[0]["clock"] == 3.0


def test_the_quorum_decides_when_all_have_answered(recipe: Recipe, tmp_path: Path, time: list[float]) -> None:
    grid = SlowGrid(*trio())
    for name in "ab":
        grid.faults["train", 1, name] = changed(metrics={"rows": 99})
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=1")
    with pytest.raises(FederationError, match="1 of 3 clients sent a usable update"):
        run_on(grid, config, tmp_path / "run")


def test_a_run_without_usable_updates_stops(recipe: Recipe, tmp_path: Path, time: list[float]) -> None:
    grid = SlowGrid(*trio(), looks=dict.fromkeys("abc", 1000))
    config = recipe(*BUFFERED, "federation.buffer=1", "federation.rounds=1", "federation.deadline=50")
    with pytest.raises(FederationError, match="0 of 3 clients sent a usable update"):
        run_on(grid, config, tmp_path / "run")


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_server_asks_those_who_were_training_for_the_same_round(
    recipe: Recipe, tmp_path: Path, time: list[float], after: int
) -> None:
    config = recipe(*BUFFERED, "federation.buffer=1", "federation.rounds=4", "federation.participation=0.6")
    late = {"c": 40, "b": 1}

    def grid() -> SlowGrid:
        return SlowGrid(*trio(), looks=late)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on(grid(), config, tmp_path / "run", Watch(**{f"round_{after}": stop}))
    left = load_server(tmp_path / "run" / "checkpoint.safetensors")
    again = grid()
    run_on(again, config, tmp_path / "run")
    for name, flight in left.flights.items():
        silo = next(silo for silo in again.nodes.values() if silo.name == name)
        assert flight.number <= after
        assert np.array_equal(silo.received[flight.number], left.sent[flight.number].vector)


def test_a_silo_that_comes_back_later_than_the_server_is_asked_for_the_same_round(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    """After a restart silos connect one by one; the work of the slow ones must not be lost."""
    config = recipe(*BUFFERED, "federation.buffer=2", "federation.rounds=4")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on(SlowGrid(*trio(), looks={"c": 40}), config, tmp_path / "run", Watch(round_1=stop))
    a, b, c = trio()
    grid = SlowGrid(a, b)
    _, logs = run_on(grid, config, tmp_path / "run", Watch(round_2=lambda: grid.enter(c)))
    assert [sorted(log["clients"]) for log in logs[1:3]] == [["a", "b"], ["a", "b", "c"]]
    assert logs[2]["late"] == {"c": 2}
    assert np.array_equal(c.received[1], START.vector)


def test_a_silo_that_leaves_while_it_trains_is_missing_after_the_deadline(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    options = ("federation.buffer=2", "federation.rounds=4", "federation.deadline=50", "federation.quorum=0.3")
    grid = SlowGrid(*trio(), looks={"c": 10**6})

    def pass_time() -> None:
        time[0] += 60

    watch = Watch(round_1=lambda: grid.leave("c"), round_2=pass_time)
    _, logs = run_on(grid, recipe(*BUFFERED, *options), tmp_path / "run", watch)
    assert [log["missing"] for log in logs] == [[], [], ["c"], []]
    assert [sorted(log["clients"]) for log in logs] == [["a", "b"]] * 4


def test_staleness_does_not_let_one_silo_outweigh_all_others(
    recipe: Recipe, tmp_path: Path, time: list[float]
) -> None:
    a, b, c = Silo("a", 1000), Silo("b", 10), Silo("c", 10)
    grid = SlowGrid(a, b, c, looks=dict.fromkeys("bc", 3))
    options = (
        "federation.mode=buffered",
        "federation.buffer=1",
        "federation.rounds=4",
        "federation.max_norm_ratio=off",
    )
    server, logs = run_on(grid, recipe("method.name=fedavg", *options), tmp_path / "run")
    assert logs[3]["late"] == {"b": 3, "c": 3}
    assert logs[3]["capped"] == {"a": 10}  # b and c count for 10 x 4^-0.5 each
    moved = server.shared.vector - a.received[4]
    by_hand = (10 * a.change(4) + 5 * b.change(1) + 5 * c.change(1)) / 30
    np.testing.assert_allclose(moved, by_hand, rtol=1e-4, atol=1e-5)


# Simulated time.


def simulated(config: RunConfig, folder: Path, silos: list[Silo]) -> tuple[Any, list[dict[str, Any]]]:
    nodes = {101 + i: silo.answer for i, silo in enumerate(silos)}
    return run_on(InProcessGrid(nodes), config, folder)  # type: ignore[arg-type]


def by_events(
    config: RunConfig, silos: list[Silo], seconds: Mapping[str, float]
) -> tuple[Vector, list[dict[str, int]], list[float]]:
    """Another implementation: a queue of events. Returns the weights, who was late by how much, and the clock."""
    federation, shared, now = config.federation, START.vector.astype(np.float64), 0.0
    known = {silo.name: silo for silo in silos}
    busy: dict[str, tuple[int, np.ndarray]] = {}
    queue: list[tuple[float, str]] = []
    late, clock = [], []
    for number in range(1, federation.rounds + 1):
        idle = sorted(known.keys() - busy.keys())
        order = torch.randperm(len(idle), generator=generator(config.seed, "participants", number)).tolist()
        for place in order[: federation.drawn(len(silos)) - len(busy)]:
            busy[idle[place]] = number, shared.copy()
            heapq.heappush(queue, (now + seconds[idle[place]], idle[place]))
        total, rows, told = np.zeros_like(shared), 0, {}
        for _ in range(federation.buffer or 0):
            end, name = heapq.heappop(queue)
            now = max(now, end)
            asked, _ = busy.pop(name)
            behind = number - asked
            total += known[name].rows * known[name].change(asked) * (1 + behind) ** -federation.staleness
            rows += known[name].rows
            told |= {name: behind} if behind else {}
        shared = shared + total / rows
        late.append(told)
        clock.append(now)
    return shared, late, clock


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.5, 4.0, 17.0]), min_size=2, max_size=5),
    st.data(),
    st.sampled_from([0.4, 0.7, 1.0]),
)
def test_simulated_rounds_are_those_of_a_queue_of_events(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, seconds: list[float], data: Any, share: float
) -> None:
    silos = [Silo("abcde"[i], 2 + i) for i in range(len(seconds))]
    table = {silo.name: value for silo, value in zip(silos, seconds, strict=True)}
    working = max(1, round(share * len(silos)))
    config = recipe(
        *BUFFERED,
        f"federation.buffer={data.draw(st.integers(1, working))}",
        "federation.rounds=5",
        f"federation.participation={share}",
        "federation.step_seconds={" + ", ".join(f"{n} = {v}" for n, v in table.items()) + "}",
    )
    server, logs = simulated(config, tmp_path_factory.mktemp("runs") / "run", silos)
    shared, late, clock = by_events(config, silos, table)
    assert [log["late"] for log in logs] == late
    assert [log["clock"] for log in logs] == clock
    np.testing.assert_allclose(server.shared.vector, shared, rtol=1e-4, atol=1e-5)


def test_synchronous_rounds_wait_for_the_slowest(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("method.name=fedavg", "federation.rounds=3", "federation.step_seconds={b = 4.0}")
    _, logs = simulated(config, tmp_path / "run", list(trio()))
    assert [log["clock"] for log in logs] == [4.0, 8.0, 12.0]


# On a tiny model.


def kept(folder: Path) -> dict[str, bytes]:
    wanted = ("personal/**/*.safetensors", "shared/*.safetensors", "predictions/*")
    return {str(p.relative_to(folder)): p.read_bytes() for w in wanted for p in folder.glob(w) if p.is_file()}


@pytest.mark.parametrize("method", ["flex", "fedavg", "fedadam", "fedprox"])
def test_a_buffer_for_all_is_a_synchronous_run(
    recipe: Recipe, shared_base: None, tmp_path: Path, method: str
) -> None:
    for mode in ("synchronous", "buffered"):
        buffer = ("federation.mode=buffered", "federation.buffer=4") if mode == "buffered" else ()
        run_federation(recipe(f"method.name={method}", *SHORT, *buffer), tmp_path / mode)
    whole, other = kept(tmp_path / "synchronous"), kept(tmp_path / "buffered")
    assert whole.keys() == other.keys()
    assert [name for name in whole if whole[name] != other[name]] == []


SLOW = (
    "federation.mode=buffered",
    "federation.buffer=2",
    "federation.rounds=4",
    "federation.participation=0.75",
    "federation.step_seconds={clinic = 4.0, shop = 1.5}",
    "evaluation.every=1",
)


class Copies(Observer):
    """Copies the run as it is on disk after every round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def round(self, record: Any) -> None:
        copy = self.folder.with_name(f"after-{record['number']}")
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns(".lock"))


@pytest.mark.parametrize("method", ["flex", "fedavg"])
def test_a_resumed_buffered_run_has_the_same_bits(
    recipe: Recipe, shared_base: None, tmp_path: Path, method: str
) -> None:
    config = recipe(f"method.name={method}", *SHORT, *SLOW)
    run_federation(config, tmp_path / "whole", Copies(tmp_path / "whole"))
    logs = [json.loads(line) for line in (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()]
    assert any(log["late"] for log in logs)
    whole = kept(tmp_path / "whole")
    for number in (1, 2, 3):
        run_federation(config, tmp_path / f"after-{number}", resume=True)
        found = kept(tmp_path / f"after-{number}")
        assert whole.keys() == found.keys()
        assert [name for name in whole if whole[name] != found[name]] == []
        again = [
            json.loads(line) for line in (tmp_path / f"after-{number}" / "rounds.jsonl").read_text().splitlines()
        ]
        for name in ("downlink", "declared", "groups", "uplink"):
            assert [log[name] for log in again] == [log[name] for log in logs]


def test_workers_do_not_change_a_buffered_run(recipe: Recipe, shared_base: None, tmp_path: Path) -> None:
    config = recipe("method.name=flex", *SHORT, *SLOW, "engine.threads=1")
    run_federation(config, tmp_path / "one")
    run_federation(
        recipe("method.name=flex", *SHORT, *SLOW, "engine.threads=1", "engine.workers=2"), tmp_path / "two"
    )
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (("method.name=fedavg",), [4, 4]),
        (("method.name=fedrep",), [2, 2]),
        (("method.name=flex", 'method.options={phases="alternating"}'), [2, 2]),
        (("method.name=ditto",), [4, 4]),
        (("method.name=feddpa_t",), [4, 4]),
    ],
)
def test_steps_of_the_personal_weights_alone_are_told_apart(
    recipe: Recipe, shared_base: None, tmp_path: Path, method: tuple[str, ...], shared: list[int]
) -> None:
    settings = ("training.local_steps=4", "training.local_seconds=9", "federation.rounds=2")
    run_federation(recipe(*method, *SHORT, *settings), tmp_path / "run")
    logs = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [log["clients"]["shop"]["shared_steps"] for log in logs] == shared


@pytest.mark.parametrize(
    ("seconds", "table", "steps", "clock"),
    [
        # The clinic's second step begins after 4 of 6 seconds, as on a real silo.
        (6, {"clinic": 4.0, "shop": 2.0, "law_firm": 60.0}, [2, 6, 1, 3], 60.0),
        (0.6, {"clinic": 0.2, "shop": 0.15}, [3, 1, 1, 4], 1.0),  # 0.6 / 0.2 is 2.9999999999999996
        (2.1, {"clinic": 0.7, "shop": 1e-9}, [3, 3, 3, 6], 3.0),  # 2.1 / 0.7 is 3.0000000000000004
        (1e-12, {}, [1, 1, 1, 1], 1.0),
    ],
)
def test_a_slow_client_takes_fewer_steps(
    recipe: Recipe,
    shared_base: None,
    tmp_path: Path,
    seconds: float,
    table: dict[str, float],
    steps: list[int],
    clock: float,
) -> None:
    config = recipe(
        "method.name=fedavg",
        *SHORT,
        "training.local_steps=6",
        f"training.local_seconds={seconds}",
        "federation.rounds=1",
        "federation.step_seconds={" + ", ".join(f"{n} = {v}" for n, v in table.items()) + "}",
    )
    run_federation(config, tmp_path / "run")
    [log] = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [log["clients"][name]["steps"] for name in ("clinic", "help_desk", "law_firm", "shop")] == steps
    assert log["clock"] == pytest.approx(clock)


# What is refused.


@pytest.mark.parametrize(
    "setting", [("federation.mode=buffered", "federation.buffer=2"), ("training.local_seconds=5",)]
)
@pytest.mark.parametrize(
    "other",
    [
        ("method.name=scaffold", "training.optimizer=sgd"),
        ("method.name=fdlora",),
        ("method.name=fedex_lora",),
        ("method.name=local",),
        ("method.name=feddpa_f",),
        ("method.name=fedalt",),
        ("method.name=centralized",),
        ("method.name=flex", "method.options={finish=1}"),
        ("method.name=fedavg", "privacy.aggregation=secure"),
        ("method.name=fedavg", "compression.downlink=int8"),
        ("method.name=fedavg", "privacy.noise=local"),
    ],
)
def test_what_needs_one_cohort_is_refused(recipe: Recipe, setting: tuple[str, ...], other: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"buffered|local_seconds"):
        check_settings(recipe(*setting, *other))


def test_a_buffer_needs_a_mode_and_enough_clients(recipe: Recipe, shared_base: None, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValidationError), match="belong together"):
        recipe("federation.mode=buffered")
    with pytest.raises((ConfigError, ValidationError), match="belong together"):
        recipe("federation.buffer=3")
    with pytest.raises(ConfigError, match=r"federation\.buffer = 5"):
        run_federation(recipe(*BUFFERED, "federation.buffer=5", *SHORT), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_seconds_of_a_client_that_does_not_exist_are_refused(
    recipe: Recipe, shared_base: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"step_seconds: 'clinik'.*did you mean 'clinic'"):
        run_federation(recipe("federation.step_seconds={clinik = 4.0}", *SHORT), tmp_path / "run")
