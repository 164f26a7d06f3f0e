"""A silo's reply that breaks the schema is refused by name; the run is that of the others, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import info_of, records
from flexperts.config.run import RunConfig

from ..federation.scripted_grid import (  # noqa: TID252
    FOUR,
    SHARING,
    START,
    Fault,
    ScriptedGrid,
    Silo,
    Watch,
    answered,
    bits,
    changed,
    losses,
    run_on,
    trio,
)

Recipe = Callable[..., RunConfig]
NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [[1.0, 2.0], [], 1e300, -1e300, NAN, INF, -INF, -1, -1.0, 2**62, 1.5]
"""Values of every type and size that a MetricRecord can hold; for each field, most of them are wrong."""


def with_record(name: str, record: Any) -> Fault:
    def fault(request: Message, reply: Message) -> list[Message]:
        reply.content[name] = record
        return [reply]

    return fault


def without_b(recipe: Recipe, folder: Path, *settings: str) -> tuple[bytes, dict[str, Any]]:
    """Return the result of the run in which the attacker does not exist."""
    a, _, c = trio()
    server, _ = run_on(ScriptedGrid(a, c), recipe(*FOUR, *settings), folder)
    return bits(server), summary_of(folder)


def summary_of(folder: Path) -> dict[str, Any]:
    """Return what a run found out, without times, sizes and who was refused."""
    summary = RunDirectory(folder).summary()
    return {name: summary[name] for name in ("clients", "mean", "weighted_mean", "not_finite", "parameters")}


TRAINED = ("loss", "steps", "tokens", "rows", "shared_parameters", "personal_parameters", "personal_sent")
LEGITIMATE = ("loss = -1", "loss = -1.0", "loss = 1.5", f"loss = {2**62}")
BAD_UPDATES: dict[str, Fault] = {
    **{
        f"{name} = {value}": changed(metrics={name: value})
        for name in TRAINED
        for value in ODD
        if f"{name} = {value}" not in LEGITIMATE
    },
    **{f"no {name}": changed(without=[name]) for name in (*TRAINED, "base", "round", "client")},
    "an unknown number": changed(metrics={"accuracy": 1.0}),
    "an unknown text": changed(info={"note": "x"}),
    "a packing": changed(info={"packing": "fp16"}),
    "a block": changed(info={"block": 7}),
    "a base that is no text": changed(info={"base": 5}),
    "a base of 1 MB": changed(info={"base": "b" * 10**6}),
    "a name that is no text": changed(info={"client": ["b"]}),
    "a round that is no whole number": changed(info={"round": 1.5}),
    "another record": with_record("more", MetricRecord({"x": 1})),
    "texts for numbers": with_record("metrics", ConfigRecord({"loss": "1"})),
    "numbers for texts": with_record("info", MetricRecord({"round": 1})),
}


def test_updates_that_break_the_schema(recipe: Recipe, tmp_path: Path) -> None:
    """In each round b tries another one."""
    grid, watch, number = ScriptedGrid(*trio()), Watch(), len(BAD_UPDATES)
    grid.faults |= {("train", at, "b"): fault for at, fault in enumerate(BAD_UPDATES.values(), 1)}
    settings = (f"federation.rounds={number}",)
    server, rounds = run_on(grid, recipe(*FOUR, *settings), tmp_path / "run", watch)
    taken = [kind for kind, record in zip(BAD_UPDATES, rounds, strict=True) if [*record["refused"]] != ["b"]]
    assert taken == []
    assert [[*record["clients"]] for record in rounds] == [["a", "c"]] * number
    assert all(reason.isprintable() and len(reason) < 500 for _, reason in watch.refusals)
    assert bits(server) == without_b(recipe, tmp_path / "other", *settings)[0]
    assert RunDirectory(tmp_path / "run").summary()["clients"]["b"]["nll"]["global"] == 5


SCORED = ("rows", "nll.global", "rouge_l.zero_shot", "rouge_l.global")
BAD_SCORES: dict[str, Fault] = {
    **{
        f"{name} = {value}": changed(metrics={name: value})
        for name in SCORED
        for value in ([1.0], [], 1e300, -1e300, -1, -1.0, 2**62)
        if (name, value) != ("nll.global", 2**62)
    },
    "a ROUGE-L above 100": changed(metrics={"rouge_l.global": 100.5}),
    "NaN rows": changed(metrics={"rows": NAN}),
    "half a row": changed(metrics={"rows": 1.5}),
    **{f"no {name}": changed(without=[name]) for name in (*SCORED, "metrics", "info", "round", "client")},
    "a state that was not asked for": changed(metrics={"nll.personalized": 0.1}),
    "an unknown score": changed(metrics={"bleu.global": 1.0}),
    "some counts about answers": changed(metrics={"max_new_tokens": 4}),
    "a count that is a list": changed(
        metrics={"max_new_tokens": [4], "longer_references": 0, "cut.zero_shot": 0, "cut.global": 0}
    ),
    "an unknown text": changed(info={"note": "x"}),
    "weights": lambda request, reply: [
        answered(request, records({**info_of(reply.content)}, {"rows": 2, **SCORES}, START))
    ],
}  # fmt: skip
SCORES = {f"{kind}.{state}": 5.0 for kind in ("nll", "rouge_l") for state in ("zero_shot", "global")}


def test_scores_that_break_the_schema(recipe: Recipe, tmp_path: Path) -> None:
    """After each round b tries other ones."""
    grid, number = ScriptedGrid(*trio()), len(BAD_SCORES)
    grid.faults |= {("evaluate", at, "b"): fault for at, fault in enumerate(BAD_SCORES.values(), 1)}
    settings = (f"federation.rounds={number}", "evaluation.every=1")
    _, rounds = run_on(grid, recipe(*FOUR, *settings), tmp_path / "run")
    taken = [kind for kind, record in zip(BAD_SCORES, rounds, strict=True) if [*record["unscored"]] != ["b"]]
    assert taken == []
    without_b(recipe, tmp_path / "other", *settings)
    other = RunDirectory(tmp_path / "other").rounds()
    assert [record["scores"] for record in rounds] == [record["scores"] for record in other]
    assert RunDirectory(tmp_path / "run").summary()["mean"] == RunDirectory(tmp_path / "other").summary()["mean"]


def test_a_score_that_was_not_asked_for_changes_no_mean(recipe: Recipe, tmp_path: Path) -> None:
    """Answers are generated after the last round only; ROUGE-L in an earlier one is b's invention."""
    a, b, c = trio()
    grid = ScriptedGrid(a, b, c)
    for number in range(1, 5):
        grid.faults["evaluate", number, "b"] = changed(metrics={"rouge_l.global": 99.0})
    config = recipe(*FOUR, "evaluation.every=1", "evaluation.answers=last")
    _, rounds = run_on(grid, config, tmp_path / "run")
    assert all(name.startswith(("nll", "rows")) for name in rounds[0]["scores"]["b"])
    assert rounds[3]["scores"]["b"]["rouge_l.global"] == 99


def test_more_scored_rows_than_the_recipe_has(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    grid.faults["evaluate", 4, "b"] = changed(metrics={"rows": 10**6})
    _, rounds = run_on(grid, recipe(*FOUR, "evaluation.rows=2"), tmp_path / "run")
    assert (
        "1000000 rows: the number of scored rows must be a whole number from 1 to 2" in rounds[3]["unscored"]["b"]
    )


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_model_that_diverged_keeps_its_form(recipe: Recipe, tmp_path: Path, value: float) -> None:
    """NaN and infinity are taken for scores alone: an honest silo whose model diverged sends them."""
    grid = ScriptedGrid(*trio())
    grid.faults["evaluate", 4, "b"] = changed(metrics={"nll.global": value, "rouge_l.global": value})
    _, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert rounds[3]["unscored"] == {}
    assert rounds[3]["scores"]["b"]["nll.global"] is rounds[3]["scores"]["b"]["rouge_l.global"] is None
    assert "diverged" in RunDirectory(tmp_path / "run").summary()["not_finite"]["b"]["global"]


BAD_JOINS: dict[str, Fault] = {
    **{
        f"train_rows = {value!r}": changed(info={"train_rows": value})
        for value in (1e300, NAN, -1, 2**62, "7", [7], True, b"7", "none")
    },
    **{f"base = {value!r}": changed(info={"base": value}) for value in (5, "", "b" * 10**6, b"x")},
    **{
        f"report {value[:20]!r}": changed(info={"report": value})
        for value in ("NaN", "1e999", '{"layer": [NaN]}', "[" * 100_000, "{")
    },
    "a report of 5 MB": changed(info={"report": json.dumps("x" * 5_000_000)}),
    "an unknown text": changed(info={"role": "admin"}),
    "an unknown number": changed(metrics={"x": 1}),
    "weights": lambda request, reply: [answered(request, records({**JOIN, "client": "b"}, {}, START))],
}
JOIN = {"base": "ba5e" * 16, "train_rows": 5, "report": "null"}


def test_introductions_that_break_the_schema(recipe: Recipe, tmp_path: Path) -> None:
    """Before each round b tries another one."""
    grid, watch, number = ScriptedGrid(*trio()), Watch(), len(BAD_JOINS)
    faults = list(BAD_JOINS.values())

    def next_one(request: Message, reply: Message) -> list[Message]:
        return faults.pop(0)(request, reply)

    grid.faults["query.join", 0, "b"] = next_one
    settings = (f"federation.rounds={number - 1}",)
    server, rounds = run_on(grid, recipe(*FOUR, *settings), tmp_path / "run", watch)
    assert faults == []
    assert sorted(server.clients) == sorted(server.reports) == ["a", "c"]
    assert all([*record["refused"]] == ["b"] for record in rounds)
    assert all(reason.isprintable() for _, reason in watch.refusals)
    assert (bits(server), summary_of(tmp_path / "run")) == without_b(recipe, tmp_path / "other", *settings)


FLEX_REPORTS = ['{"layer": ["1", 2]}', '{"layer": [1e300, 1]}', '{"\\u001b[31m": [1, 2]}', "[]", '"text"', "7"]
REPORTS = [
    *((SHARING, report) for report in FLEX_REPORTS),
    (FOUR, '{"layer": [1, 2]}'),
    (FOUR, '"text"'),
    (FOUR, "0"),
]


@pytest.mark.parametrize(("settings", "report"), REPORTS)
def test_a_report_that_is_not_of_the_method_s_type(
    recipe: Recipe, tmp_path: Path, settings: tuple[str, ...], report: str
) -> None:
    told = [losses(3, 1), losses(2, 1)] if settings is SHARING else [None, None]
    a, b, c = Silo("a", 3, report=told[0]), Silo("b", 5), Silo("c", 7, report=told[1])
    grid = ScriptedGrid(a, b, c)
    grid.faults["query.join", 0, "b"] = changed(info={"report": report})
    server, rounds = run_on(grid, recipe(*settings), tmp_path / "run")
    assert [*rounds[0]["refused"]] == ["b"]
    other, _ = run_on(ScriptedGrid(a, c), recipe(*settings), tmp_path / "other")
    assert (bits(server), server.agreement, server.reports) == (bits(other), other.agreement, other.reports)


ROW = {"group": "shared", "tensors": 1, "parameters": 1, "bytes": 1, "trained": "yes", "leaves": "never"}
BAD_ROWS = ({"group": "\x1b[31m"}, {"tensors": -1}, {"parameters": 1e300}, {"leaves": "\x1b[31m"}, {"more": 1})
BAD_SPLITS = ["null", "{}", "[null]", "[1, 2]", "NaN", json.dumps([ROW] * 4)]
BAD_SPLITS += [json.dumps([{**ROW, **change}]) for change in BAD_ROWS]


@pytest.mark.parametrize("split", BAD_SPLITS)
def test_a_split_that_is_no_table(recipe: Recipe, tmp_path: Path, split: str) -> None:
    a, b, c = trio()
    grid, watch = ScriptedGrid(a, b, c), Watch()
    grid.faults["query.initial", 0, "a"] = changed(info={"split": split})
    server, _ = run_on(grid, recipe(*FOUR), tmp_path / "run", watch)
    assert watch.refusals[0][0] == "a"
    assert "initial weights" in watch.refusals[0][1]
    assert server.round == 4
    assert (tmp_path / "run" / "summary.json").exists()


def test_nothing_of_a_refused_reply_is_in_a_file(recipe: Recipe, tmp_path: Path) -> None:
    grid, mark = ScriptedGrid(*trio()), "mark1234567"
    grid.faults |= {
        ("train", 2, "b"): changed(info={mark: mark}, metrics={mark: 1.0}),
        ("evaluate", 4, "b"): changed(metrics={f"cut.{mark}": 1, mark: 2.0}),
    }
    run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert mark.encode() not in (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    for record in RunDirectory(tmp_path / "run").rounds():
        without_reasons = {**record, "refused": {}, "unscored": {}}
        assert mark not in json.dumps(without_reasons)


def test_an_error_of_any_type_is_named_and_does_not_end_the_run(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    for number, error in enumerate((b"x", ["a", "b"], 5, "e" * 10**7), 1):
        content = RecordDict({"info": ConfigRecord({"client": "b", "error": error})})
        grid.faults["train", number, "b"] = lambda request, reply, made=content: [answered(request, made)]
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert all("b answers with an error" in record["refused"]["b"] for record in rounds)
    assert all(len(record["refused"]["b"]) < 500 for record in rounds)
    assert bits(server) == without_b(recipe, tmp_path / "other")[0]
