"""Who is in a run: waiting for silos, silos that go, come back, come late or may not come, and are forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import records
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError, FederationError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.server import enrolment
from flexperts.server.checkpoint import load_server, save_server
from flexperts.server.enrolment import enrol, most_common
from flexperts.server.exchange import one_line
from flexperts.server.membership import Introduction, Membership

from .scripted_grid import (
    BASE,
    FOUR,
    SHARING,
    ScriptedGrid,
    Silo,
    Watch,
    answered,
    bits,
    changed,
    dead,
    drop,
    expected,
    losses,
    run_on,
    stopped,
    trio,
)

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]


class Clock:
    """Time that passes only where somebody sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0
        self.events: dict[int, Callable[[], Any]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now, self.slept = self.now + seconds, self.slept + 1
        self.events.get(self.slept, lambda: None)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(enrolment, "time", made)
    return made


# Before round 1.


def test_it_waits_until_enough_have_joined(recipe: Recipe, tmp_path: Path, clock: Clock) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a)
    clock.events = {3: lambda: grid.enter(b), 5: lambda: grid.enter(c)}
    server, rounds = run_on(grid, recipe(*FOUR, "federation.min_clients=2"), tmp_path / "run")
    assert clock.slept == 3  # it does not wait for c
    assert server.clients == {"a": 3, "b": 5}
    assert rounds[0]["participants"] == ["a", "b"]
    assert [who for kind, who in grid.asked if kind == "query.join"] == ["a", "b"]


def test_it_does_not_wait_where_all_are_there(recipe: Recipe, tmp_path: Path, clock: Clock) -> None:
    run_on(ScriptedGrid(*trio()), recipe(*FOUR, "federation.min_clients=3"), tmp_path / "run")
    assert clock.slept == 0


def test_it_gives_up_at_the_deadline_and_says_who_joined(recipe: Recipe, tmp_path: Path, clock: Clock) -> None:
    a, b, _ = trio()
    grid, watch = ScriptedGrid(a, b), Watch()
    grid.faults["query.join", 0, "b"] = lambda request, reply: [answered(request, records({"error": "no disk"}))]
    with pytest.raises(FederationError) as caught:
        run_on(grid, recipe(*FOUR, "federation.min_clients=2"), tmp_path / "run", watch)
    said = str(caught.value)
    assert said.startswith("1 clients have joined (a; refused: node 102 (it cannot join: no disk")
    assert "federation.min_clients = 2 must join within federation.deadline = 50 s" in said
    assert clock.slept == 50
    assert len(watch.refusals) == 1  # asked fifty times, told once
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_silo_that_could_not_join_is_asked_again(recipe: Recipe, tmp_path: Path, clock: Clock) -> None:
    a, b, _ = trio()
    grid = ScriptedGrid(a, b)
    grid.faults["query.join", 0, "b"] = dead
    clock.events = {2: grid.faults.clear}
    server, rounds = run_on(grid, recipe(*FOUR, "federation.min_clients=2"), tmp_path / "run")
    assert server.clients == {"a": 3, "b": 5}
    assert "Node Unavailable" in rounds[0]["refused"]["node 102"]


def test_in_one_process_nobody_is_waited_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it slept")

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(FederationError, match="4 clients have joined"):
        run_federation(recipe("federation.min_clients=5"), tmp_path / "few")
    run_federation(recipe("federation.rounds=1", "evaluation.max_new_tokens=1"), tmp_path / "run")


BAD_JOINS: dict[str, tuple[Any, str]] = {
    "silent": (drop, "sent no introduction"),
    "dead": (dead, "Node Unavailable"),
    "error": (lambda q, r: [answered(q, records({"error": "no rows here"}))], "it cannot join: no rows here"),
    "nothing": (changed(without=["info"]), "its introduction cannot be read"),
    "no name": (changed(without=["client"]), "its introduction cannot be read"),
    "path": (changed(info={"client": "../b"}), "a client's name is letters"),
    "no rows": (changed(info={"train_rows": 0}), "0 train rows"),
    "text": (changed(info={"train_rows": "many"}), "its introduction cannot be read"),
    "report": (changed(info={"report": "{"}), "its introduction cannot be read"),
}  # fmt: skip


def test_who_says_its_name_is_refused_by_it_unless_it_is_anothers(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    for name, said in (("b", "b"), ("c", "a")):
        grid.faults["query.join", 0, name] = changed(info={"client": said, "error": "no disk"})
    _, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert rounds[0]["refused"].keys() == {"b", "node 103"}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("A", "its name looks like that of a"),
        ("а", "its name looks like that of a"),  # Cyrillic
        ("ａ", "a client's name is letters"),  # fullwidth
        ("bа", "of one script"),
        ("b\u200b", "ZERO WIDTH SPACE"),
    ],
)
def test_no_name_reads_like_anothers(recipe: Recipe, tmp_path: Path, said: str, reason: str) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    grid.faults["query.join", 0, "b"] = changed(info={"client": said})
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert server.clients == {"a": 3, "c": 7}
    assert reason in "".join(rounds[0]["refused"].values())


def test_a_name_is_free_again_when_its_owner_has_gone() -> None:
    members = Membership(Observer())
    for node, name in ((1, "Zürich"), (2, "Bern")):
        assert members._let_in(node, introduction(name)) == name
    assert members._let_in(3, introduction("ZÜRICH")) is None
    members.turn_away("Zürich", "it is wrong")
    assert members._let_in(3, introduction("Zu\u0308rich")) == "Zürich"
    assert members.online == ["Bern", "Zürich"]


def introduction(name: str) -> Message:
    asked = Message(records({}), 1, "query.join")
    return Message(records({"client": name, "base": "0", "train_rows": 1, "report": "null"}), reply_to=asked)


@pytest.mark.parametrize("name", ["Clinic", "clınıc", "CLINIC"])
def test_a_newcomer_must_not_read_like_a_client_of_the_run(name: str) -> None:
    server = Server(Payload.of({}), {"clinic": 1}, {"clinic": None}, base="0")
    one = Introduction.read(introduction(name))
    with pytest.raises(FederationError, match="the run has a client 'clinic', and two names must not look alike"):
        enrol(Method(), server, one)


@pytest.mark.parametrize("kind", BAD_JOINS)
def test_who_cannot_join_is_left_out_and_the_run_goes_on(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    a, b, c = trio()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    fault, said = BAD_JOINS[kind]
    grid.faults["query.join", 0, "b"] = fault
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    ((who, reason),) = rounds[0]["refused"].items()
    assert who == ("b" if kind in ("no rows", "text", "report") else "node 102")
    assert said in reason
    assert watch.refusals[0] == (who, reason)
    assert bits(server) == expected([(a, c)] * 4).tobytes()


def test_of_two_introductions_of_a_node_the_first_counts(recipe: Recipe, tmp_path: Path) -> None:
    """And one of a node that was not asked does not count at all."""
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)

    def thrice(request: Message, reply: Message) -> list[Message]:
        (other,) = changed(info={"client": "d"})(
            request, Message(b.answer("query.join", request.content), reply_to=request)
        )
        stranger = grid.create_message(request.content, "query.join", 999, "join")
        return [answered(stranger, other.content), other, reply]  # the last is first

    grid.faults["query.join", 0, "b"] = thrice
    server, _ = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert server.clients == {"a": 3, "b": 5, "c": 7}


def test_the_first_usable_initial_weights_are_taken(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    grid.faults["query.initial", 0, "a"] = drop
    grid.faults["query.initial", 0, "b"] = changed(
        payload=lambda p: replace(p, vector=p.vector * np.float32("nan"))
    )
    server, _ = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert bits(server) == expected([(a, c)] * 4).tobytes()  # b's weights were not those of its digest
    assert [who for who, _ in watch.refusals] == ["a", "b"]
    assert [who for kind, who in grid.asked if kind == "query.initial"] == ["a", "b", "c", "b", "c"]


def test_without_any_initial_weights_all_are_named(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    grid.faults |= {
        ("query.initial", 0, "a"): drop,
        ("query.initial", 0, "b"): dead,
        ("query.initial", 0, "c"): changed(info={"split": "["}),
    }
    with pytest.raises(FederationError) as caught:
        run_on(grid, recipe(*FOUR), tmp_path / "run")
    for said in ("a sent no initial weights", "b answers with an error: Node Unavailable", "c's initial weights"):
        assert said in str(caught.value)


# Names and bases.


def test_of_two_nodes_with_one_name_the_first_stays(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c, Silo("b", 99))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert "node 104 has the same name" in rounds[0]["refused"]["b"]
    assert [who for kind, who in grid.asked if kind == "query.join"] == ["a", "b", "c", "b"]  # and not every round
    assert bits(server) == expected([(a, b, c)] * 4).tobytes()


@pytest.mark.parametrize(
    ("bases", "common"),
    [("xyy", "y"), ("xyx", "x"), ("xyz", "x"), ("yxz", "y"), ("xyyxz", "x"), ("zyyx", "y"), ("", "")],
)
def test_the_base_is_that_of_most_and_else_of_the_first(bases: str, common: str) -> None:
    """The first is the one that came first, whatever its name."""
    assert most_common(dict(zip("abcde", bases, strict=False))) == common
    assert most_common(dict(zip("edcba", bases, strict=False))) == common


def test_another_base_is_refused_by_name(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = Silo("a", 3, base="0ther"), Silo("b", 5), Silo("c", 7)
    server, rounds = run_on(ScriptedGrid(a, b, c), recipe(*FOUR, "federation.min_clients=2"), tmp_path / "run")
    assert rounds[0]["refused"]["a"].startswith(f"a has the base 0ther: the run's base is {BASE[:16]}")
    assert bits(server) == expected([(b, c)] * 4).tobytes()
    assert server.base == BASE
    assert RunDirectory(tmp_path / "run").summary()["base"]["fingerprint"] == BASE
    with pytest.raises(FederationError, match=r"2 clients have joined \(b, c; refused: a \(a has the base 0ther"):
        run_on(
            ScriptedGrid(a, b, c),
            recipe(*FOUR, "federation.min_clients=3", "federation.deadline=0.01"),
            tmp_path / "few",
        )


def test_a_resumed_run_keeps_its_base_though_most_have_another(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    b.base = c.base = "0ther"
    grid = ScriptedGrid(a, b, c)
    with pytest.raises(FederationError, match="round 3: 1 of 3 clients"):
        run_on(grid, config, out, watch := Watch())
    assert [who for who, _ in watch.refusals] == ["b", "c"]


def test_in_process_too(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose base differs is left out, and the others' run is a run of three."""
    from flexperts.client.client import Client

    join = Client.join

    def other_base(self: Client) -> dict[str, Any]:
        return join(self) | ({"base": "0ther"} if self.name == "shop" else {})

    monkeypatch.setattr(Client, "join", other_base)
    summary = run_federation(recipe("federation.rounds=1", "evaluation.max_new_tokens=1"), tmp_path / "run")
    assert sorted(summary["clients"]) == ["clinic", "help_desk", "law_firm"]
    assert "shop has the base 0ther" in RunDirectory(tmp_path / "run").rounds()[0]["refused"]["shop"]


# Going and coming.


def test_a_silo_that_goes_is_missing_by_name(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    watch = Watch(round_2=lambda: grid.leave("b"))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert [r["missing"] for r in rounds] == [[], [], ["b"], ["b"]]
    assert [r["left"] for r in rounds] == [[], [], ["b"], []]
    assert rounds[3]["unscored"] == {"b": "it was not online"}
    assert "gone: b" in watch.stages
    assert bits(server) == expected([(a, b, c)] * 2 + [(a, c)] * 2).tobytes()
    assert server.clients == {"a": 3, "b": 5, "c": 7}


def test_a_silo_that_comes_back_gets_the_current_weights(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    watch = Watch(round_1=lambda: grid.leave("b"), round_2=lambda: grid.enter(b))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    present = [(a, b, c), (a, c), (a, b, c), (a, b, c)]
    assert [r["missing"] for r in rounds] == [[], ["b"], [], []]
    assert [(r["left"], r["joined"]) for r in rounds] == [([], []), (["b"], []), ([], ["b"]), ([], [])]
    assert bits(server) == expected(present).tobytes()
    assert b.received[3].tobytes() == expected(present[:2]).tobytes()


def test_a_silo_that_restarts_between_two_rounds_misses_none(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    again = Silo("b", 5)
    watch = Watch(round_1=lambda: grid.leave("b") and grid.enter(again))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert ([*b.received], [*again.received]) == ([1], [2, 3, 4])
    assert rounds[1]["left"] == rounds[1]["joined"] == rounds[1]["missing"] == []
    assert [who for kind, who in grid.asked if kind == "query.join"] == ["a", "b", "c"]
    assert bits(server) == expected([(a, b, c)] * 4).tobytes()


def test_a_name_stays_its_nodes_when_that_has_gone(recipe: Recipe, tmp_path: Path) -> None:
    """A silo that comes back with another key is refused, whether its old node still counts as online or not."""
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    grid.faults["train", 2, "b"] = drop
    watch = Watch(round_1=lambda: grid.enter(b, 200), round_2=lambda: grid.nodes.pop(102))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert [[*r["refused"]] for r in rounds] == [[], ["node 200"], ["node 200"], []]
    assert "node 200 says b, a name that belongs to node 102" in rounds[1]["refused"]["node 200"]
    assert [r["missing"] for r in rounds] == [[], ["b"], ["b"], ["b"]]
    assert bits(server) == expected([(a, b, c), (a, c), (a, c), (a, c)]).tobytes()


def test_a_silo_may_come_back_with_more_rows(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)

    def grown() -> None:
        b.rows = 50
        grid.enter(b)

    watch = Watch(round_1=lambda: grid.leave("b"), round_2=grown)
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert server.clients == {"a": 3, "b": 50, "c": 7}
    assert [r["clients"].get("b", {}).get("rows") for r in rounds] == [5, None, 50, 50]


def test_a_new_silo_joins_midway(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, c)
    watch = Watch(round_2=lambda: grid.enter(b))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert [r["joined"] for r in rounds] == [[], [], ["b"], []]
    assert [r["participants"] for r in rounds] == [["a", "c"]] * 2 + [["a", "b", "c"]] * 2
    assert "joining: b" in watch.stages
    assert server.clients == {"a": 3, "b": 5, "c": 7}
    assert server.reports == {"a": None, "b": None, "c": None}
    assert bits(server) == expected([(a, c)] * 2 + [(a, b, c)] * 2).tobytes()
    assert sorted(RunDirectory(tmp_path / "run").summary()["clients"]) == ["a", "b", "c"]


def test_a_newcomer_cannot_change_what_was_settled(recipe: Recipe, tmp_path: Path) -> None:
    """FLEx's common expert is that of the lowest mean loss: 1 for a and c, and for b too it would be; d says 0."""
    a, c = Silo("a", 3, report=losses(3, 1)), Silo("c", 7, report=losses(2, 1))
    b, d = Silo("b", 5, report=losses(5, 1)), Silo("d", 2, report=losses(0, 9))
    grid, watch = ScriptedGrid(a, c), Watch()
    watch.after = {"round_1": lambda: grid.enter(b), "round_2": lambda: grid.enter(d)}
    server, rounds = run_on(grid, recipe(*SHARING), tmp_path / "run", watch)
    assert server.agreement == {"layer": [1, 0]}
    assert [r["joined"] for r in rounds] == [[], ["b"], [], []]
    assert "it is fixed before round 1" in rounds[2]["refused"]["d"]
    assert [who for kind, who in grid.asked if kind == "query.join"].count("d") == 1
    assert bits(server) == expected([(a, c), (a, b, c), (a, b, c), (a, b, c)]).tobytes()
    assert sorted(server.reports) == ["a", "b", "c"]


@pytest.mark.parametrize("report", [losses(1), {"other": [1, 2]}, [], "text", 3], ids=str)
def test_a_report_that_the_method_cannot_read_is_refused(recipe: Recipe, tmp_path: Path, report: Any) -> None:
    a, c = Silo("a", 3, report=losses(3, 1)), Silo("c", 7, report=losses(2, 1))
    grid = ScriptedGrid(a, Silo("b", 5, report=report), c)
    server, rounds = run_on(grid, recipe(*SHARING), tmp_path / "run")
    assert "the method cannot read it" in rounds[0]["refused"]["b"]
    assert server.agreement == {"layer": [1, 0]}
    assert bits(server) == expected([(a, c)] * 4).tobytes()


def test_a_newcomer_of_another_base_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    b.base = "0ther"
    grid = ScriptedGrid(a, c)
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", Watch(round_1=lambda: grid.enter(b)))
    assert "b has the base 0ther" in rounds[1]["refused"]["b"]
    assert server.clients == {"a": 3, "c": 7}


# Taking up a run.


def test_a_run_is_taken_up_without_those_that_are_not_there_and_with_new_ones(
    recipe: Recipe, tmp_path: Path
) -> None:
    a, b, c = trio()
    d, config, out = Silo("d", 9), recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    server, rounds = run_on(ScriptedGrid(a, c, d), config, out)
    assert server.clients == {"a": 3, "b": 5, "c": 7, "d": 9}
    assert [r["missing"] for r in rounds] == [[], [], ["b"], ["b"]]
    assert bits(server) == expected([(a, b, c)] * 2 + [(a, c, d)] * 2).tobytes()


def test_a_run_has_one_id_for_good(recipe: Recipe, tmp_path: Path) -> None:
    config, ids = recipe(*FOUR), set()
    for name in ("one", "two"):
        stopped(config, tmp_path / name, *trio())
        before = RunDirectory(tmp_path / name).run_id
        run_on(ScriptedGrid(*trio()), config, tmp_path / name)
        assert RunDirectory(tmp_path / name).run_id == before
        assert len(before) == 32
        assert int(before, 16) >= 0
        ids.add(before)
    assert len(ids) == 2
    (tmp_path / "one" / "run_id").write_text("../elsewhere")
    with pytest.raises(ArtifactError, match="32 hex digits"):
        _ = RunDirectory(tmp_path / "one").run_id


def test_a_checkpoint_from_before_bases_were_kept_takes_that_of_most(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    path = out / "checkpoint.safetensors"
    save_server(path, replace(load_server(path), base=""))
    assert run_on(ScriptedGrid(a, b, c), config, out)[0].base == BASE


def test_reasons_are_one_line_of_bounded_length() -> None:
    assert one_line(" a\n\tb  c ") == "a b c"
    assert len(one_line("x" * 5000)) == 403


def test_messages_of_a_grid_that_streams_are_made_one_by_one(recipe: Recipe, tmp_path: Path) -> None:
    """Only Flower's own grids get all of a round's messages at once."""
    from flexperts.engines.grid import InProcessGrid
    from flexperts.server.exchange import sendable

    made: list[int] = []

    def messages() -> Any:
        for number in (1, 2):
            made.append(number)
            yield number

    streaming: Any = sendable(InProcessGrid.__new__(InProcessGrid), messages())
    assert made == []
    assert next(streaming) == 1
    assert isinstance(sendable(ScriptedGrid(), messages()), list)
