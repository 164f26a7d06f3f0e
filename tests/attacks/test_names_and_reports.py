"""A name belongs to the node that had it first, and one silo's malformed report turns no other away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from tests.federation.scripted_grid import (
    FOUR,
    SHARING,
    ScriptedGrid,
    Silo,
    Watch,
    bits,
    expected,
    losses,
    run_on,
    stopped,
    trio,
)
from typer.testing import CliRunner

from flexperts.artifacts import RunDirectory
from flexperts.cli.main import app
from flexperts.communication.messages import info_of, records
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError, FlexpertsError
from flexperts.methods.fedmoe_style import FedMoEStyle
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server import enrolment
from flexperts.server.checkpoint import load_server
from flexperts.server.enrolment import check_report, enrol
from flexperts.server.forget_client import forget_client
from flexperts.server.membership import Introduction

Recipe = Callable[..., RunConfig]
LOW, HIGH = 50, 900
"""Nodes before and after those of the honest silos."""


@pytest.mark.parametrize("node", [LOW, HIGH])
@pytest.mark.parametrize("said", ["b", "B"])
def test_a_name_is_not_free_while_its_silo_is_away(recipe: Recipe, tmp_path: Path, node: int, said: str) -> None:
    """The impostor comes when b has gone, and b comes back to its own place."""
    results = []
    for attacked in (False, True):
        a, b, c = trio()
        grid = ScriptedGrid(a, b, c)
        watch = Watch(round_1=lambda grid=grid: grid.leave("b"), round_2=lambda grid=grid, b=b: grid.enter(b))
        if attacked:

            def impostor(grid: ScriptedGrid = grid) -> None:
                grid.leave("b")
                grid.enter(Silo(said, 5), node)

            watch.after["round_1"] = impostor
        server, rounds = run_on(grid, recipe(*FOUR), tmp_path / f"run{attacked}", watch)
        results.append(bits(server))
        assert [r["missing"] for r in rounds] == [[], ["b"], [], []]
    who = f"node {node}" if said == "b" else said
    assert f"node {node} says b" in rounds[1]["refused"][who] if said == "b" else "looks like" in str(rounds[1])
    assert server.nodes == {"a": 101, "b": 102, "c": 103}
    assert results[0] == results[1] == expected([(a, b, c), (a, c), (a, b, c), (a, b, c)]).tobytes()


@pytest.mark.parametrize("node", [LOW, HIGH])
def test_nor_when_both_come_at_once(recipe: Recipe, tmp_path: Path, node: int) -> None:
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)

    def both() -> None:
        grid.enter(Silo("b", 5), node)
        grid.enter(b)

    watch = Watch(round_1=lambda: grid.leave("b"), round_2=both)
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert rounds[2]["joined"] == ["b"]
    assert [*rounds[2]["refused"]] == [f"node {node}"]
    assert bits(server) == expected([(a, b, c), (a, c), (a, b, c), (a, b, c)]).tobytes()


def test_nor_when_a_run_is_resumed(recipe: Recipe, tmp_path: Path) -> None:
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    grid = ScriptedGrid(a, c)
    grid.enter(Silo("b", 5), LOW)
    server, rounds = run_on(grid, config, out, Watch(round_3=lambda: grid.enter(b)))
    assert "belongs to node 102" in rounds[2]["refused"][f"node {LOW}"]
    assert bits(server) == expected([(a, b, c)] * 2 + [(a, c), (a, b, c)]).tobytes()


def test_a_node_has_one_name(recipe: Recipe, tmp_path: Path) -> None:
    """Else one silo could join under a hundred names, and leave a run whose quorum cannot be reached."""
    grid = ScriptedGrid(*trio())
    watch = Watch(round_1=lambda: grid.leave("c"), round_2=lambda: grid.enter(Silo("more", 1), 103))
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert sorted(server.clients) == ["a", "b", "c"]
    assert "node 103 is the client c of this run and now says more" in rounds[2]["refused"]["more"]


def test_what_an_impostor_sends_is_not_written_under_the_name_it_says(recipe: Recipe, tmp_path: Path) -> None:
    @dataclass
    class Broken(Silo):
        def _join(self, kind: str, content: RecordDict) -> RecordDict:
            return records({"client": self.name, "error": "no rows"})

    grid = ScriptedGrid(*trio())
    watch = Watch(round_1=lambda: grid.enter(Broken("b", 5), LOW))
    _, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert [*rounds[1]["refused"]] == [f"node {LOW}"]


@pytest.mark.parametrize("options", [[], ["--key"]])
def test_forget_releases_a_name(recipe: Recipe, tmp_path: Path, options: list[str]) -> None:
    """With --key the client stays one of the run, and may even be its only one."""
    a, b, c = trio()
    config, out = recipe(*FOUR), tmp_path / "run"
    stopped(config, out, a, b, c)
    result = CliRunner().invoke(app, ["forget", str(out), "b", *options])
    assert result.exit_code == 0, result.output
    kept = load_server(out / "checkpoint.safetensors").clients
    assert sorted(kept) == (["a", "b", "c"] if options else ["a", "c"])
    grid = ScriptedGrid(a, c)
    grid.enter(b, HIGH)
    server, _ = run_on(grid, config, out)
    assert server.nodes == {"a": 101, "b": HIGH, "c": 103}
    assert bits(server) == expected([(a, b, c)] * 4).tobytes()


def test_the_only_silo_gets_a_new_key(recipe: Recipe, tmp_path: Path) -> None:
    config, out, a = recipe(*FOUR), tmp_path / "run", trio()[0]
    stopped(config, out, a)
    forget_client(RunDirectory(out), "a", key_only=True)
    grid = ScriptedGrid()
    grid.enter(a, HIGH)
    assert run_on(grid, config, out)[0].nodes == {"a": HIGH}


def test_of_two_bases_the_one_that_was_there_first_is_the_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one whose silo has the first name."""
    a, b, _ = trio()
    grid = ScriptedGrid(a)

    def sleep(_seconds: float) -> None:
        grid.enter(Silo("0", 4, base="0ther")) if len(grid.nodes) == 1 else grid.enter(b)

    monkeypatch.setattr(enrolment.time, "sleep", sleep)
    server, rounds = run_on(grid, recipe(*FOUR, "federation.min_clients=2"), tmp_path / "run")
    assert "0 has the base 0ther" in rounds[0]["refused"]["0"]
    assert bits(server) == expected([(a, b)] * 4).tobytes()


REPORTS: list[Any] = [{"other": [1, 2]}, {"layer": [1]}, {"layer": "no"}, {"layer": [[1], [2]]}, "text", 3, [1]]


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_a_malformed_report_turns_only_its_own_silo_away(recipe: Recipe, tmp_path: Path, report: Any) -> None:
    """Though it comes first by name and by node."""
    silos = [Silo(n, rows, report=losses(*told)) for n, rows, told in (("a", 3, (3, 1)), ("b", 5, (2, 1)))]
    config = recipe(*SHARING)
    honest, _ = run_on(ScriptedGrid(*silos), config, tmp_path / "honest")
    server, rounds = run_on(ScriptedGrid(Silo("0", 4, report=report), *silos), config, tmp_path / "attacked")
    assert [*rounds[0]["refused"]] == ["0"]
    assert server.agreement == honest.agreement
    assert bits(server) == bits(honest)


def test_a_report_about_no_expert_is_allowed(recipe: Recipe, tmp_path: Path) -> None:
    silos = Silo("a", 3, report=losses(3, 1)), Silo("b", 4, report={})
    server, rounds = run_on(ScriptedGrid(*silos), recipe(*SHARING), tmp_path / "run")
    assert (server.clients, rounds[0]["refused"]) == ({"a": 3, "b": 4}, {})


@pytest.mark.parametrize("report", [9, 10**6, "4", [4], None])
def test_a_silo_of_another_recipe_turns_no_other_away(recipe: Recipe, tmp_path: Path, report: Any) -> None:

    @dataclass
    class Ending(Silo):
        def _round(self, kind: str, content: RecordDict) -> RecordDict:
            reply = super()._round(kind, content)
            if kind == "train" and info_of(content)["round"] == 5:  # the method's last round sends nothing
                del reply["shared"], reply.config_records["info"]["manifest"]
            return reply

    silos = [Ending(name, 3, report=4) for name in "ab"]
    config = recipe("method.name=feddpa_f", "federation.rounds=4", "federation.deadline=50")
    honest, _ = run_on(ScriptedGrid(*silos), config, tmp_path / "honest")
    server, rounds = run_on(ScriptedGrid(Silo("0", 4, report=report), *silos), config, tmp_path / "attacked")
    assert [*rounds[0]["refused"]] == ["0"]
    assert bits(server) == bits(honest)


HELD: list[Any] = [
    {},
    {"other": [0]},
    {"model/layers/0/mlp/experts": [0]},
    {"l": []},
    {"l": [-1]},
    {"l": [9]},
    {"l": [10**9]},
    {"l": [0, 0]},
    {"l": [0] * 10**6},
    {"l": "no"},
    {"l": ["0"]},
    {"l": None},
    [0],
    1,
]


@pytest.mark.parametrize("report", HELD, ids=lambda report: str(report)[:20])
def test_a_report_of_experts_that_there_are_not_is_refused_before_anything_is_sent(report: Any) -> None:
    experts = {f"experts.layers.l.{number}.A": torch.ones(1, 2) for number in range(2)}
    shared = Payload.of(experts | {"router.layers.l": torch.ones(2, 3)})
    server = Server(shared, {"a": 1}, {"a": {"l": [1]}}, base="0")
    method = FedMoEStyle()
    check_report(method, server, "a")
    with pytest.raises(FlexpertsError):
        enrol(method, server, Introduction("b", "0", 3, report, 10))
    assert (server.clients, server.reports) == ({"a": 1}, {"a": {"l": [1]}})


def test_a_name_with_control_characters_is_no_name(recipe: Recipe, tmp_path: Path) -> None:
    server, rounds = run_on(ScriptedGrid(*trio(), Silo("\x1b[2Jb", 5)), recipe(*FOUR), tmp_path / "run")
    assert sorted(server.clients) == ["a", "b", "c"]
    assert [*rounds[0]["refused"]] == ["node 104"]
    assert "\x1b" not in str(rounds[0]["refused"]["node 104"])


def test_without_any_report_that_fits_the_run_does_not_start(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="0 clients have joined"):
        run_on(ScriptedGrid(Silo("a", 3, report="text")), recipe(*SHARING), tmp_path / "run")
