"""Control characters, ANSI escapes, bidi overrides and line ends from a silo stop at the server's door."""

from __future__ import annotations

import logging
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from flwr.app import Error, Message
from rich.console import Console

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import records
from flexperts.config.run import RunConfig
from flexperts.deployment import server_app, worker
from flexperts.deployment.server_app import LogObserver
from flexperts.errors import FederationError, FlexpertsError, one_line, printable
from flexperts.observer import Observers
from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.studies.collect import collect_run
from flexperts.terminal.display import RunDisplay

from ..federation.scripted_grid import (  # noqa: TID252
    FOUR,
    Fault,
    ScriptedGrid,
    answered,
    bits,
    changed,
    run_on,
    trio,
)

Recipe = Callable[..., RunConfig]
NASTY = [
    "\x1b[2J\x1b[31mfinished",
    "\x1b]0;title\x07",
    "a\nround 9: everything is fine",
    "a\r\x1b[Kok",
    "\u202egnihton",
    "\u2066x\u2069",
    "\x9b31m",
    "a\u2028b",
    "\x00",
    "\ue000",
    "\ud800",
]


def error(text: str) -> Fault:
    return lambda request, reply: [answered(request, records({"client": "b", "error": text}))]


def flower_error(text: str) -> Fault:
    return lambda request, reply: [Message(Error(1, text), reply_to=request)]


def ways(text: str) -> list[tuple[str, Fault]]:
    """Return the places in which a silo can put a text."""
    return [
        ("train", error(text)),
        ("train", flower_error(text)),
        ("train", changed(info={"client": text})),
        ("train", changed(info={"base": text})),
        ("train", changed(info={text: 1})),
        ("train", changed(metrics={text: 1.0})),
        ("train", changed(info={"packing": text, "exponent": 1})),
        ("evaluate", error(text)),
        ("evaluate", changed(metrics={f"cut.{text}": 1})),
        ("evaluate", changed(info={"round": text})),
    ]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nothing_that_a_silo_sends_reaches_a_log_a_terminal_or_a_page_raw(
    recipe: Recipe, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = trio()
    grid, terminal = ScriptedGrid(a, b, c), StringIO()
    faults = ways(text)
    grid.faults |= {(kind, at, "b"): fault for at, (kind, fault) in enumerate(faults, 1)}
    display = RunDisplay(Console(file=terminal, width=400))
    caplog.set_level(logging.INFO, server_app.__name__)
    config = recipe(*FOUR, f"federation.rounds={len(faults) + 1}", "evaluation.every=1")
    run_on(grid, config, tmp_path / "run", Observers(display, LogObserver()))
    run = RunDirectory(tmp_path / "run")
    display.result(run.summary(), tmp_path)
    comparison = collect_run(tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if record.name == server_app.__name__]
    pages = [terminal.getvalue(), html_report(comparison), markdown_report(comparison)]
    lines = [line for page in pages for line in page.split("\n")]
    assert sum("refused" in line for line in said) == len(faults)
    assert all(line.isprintable() for line in said)
    assert all(line.isprintable() for line in lines)
    for path in (tmp_path / "run").glob("*.json*"):
        assert all(line.isprintable() for line in path.read_text().split("\n"))
        assert text.strip() not in path.read_text()
    for record in run.rounds():
        reasons = [*record["refused"].items(), *record["unscored"].items()]
        assert all(word.isprintable() and len(word) < 500 for pair in reasons for word in pair)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nothing_of_it_is_in_the_checkpoint(recipe: Recipe, tmp_path: Path, text: str) -> None:
    a, b, c = trio()
    grid, tries = ScriptedGrid(a, b, c), []
    tries = [
        changed(info={"client": text}),
        changed(info={"base": text}),
        changed(info={"report": text}),
        changed(info={text: 1}),
        error(text),
        flower_error(text),
    ]
    count = len(tries)
    grid.faults["query.join", 0, "b"] = lambda request, reply: tries.pop(0)(request, reply)
    server, rounds = run_on(grid, recipe(*FOUR, f"federation.rounds={count - 1}"), tmp_path / "run")
    assert tries == []
    assert sorted(server.clients) == ["a", "c"]
    assert all(word.isprintable() for record in rounds for pair in record["refused"].items() for word in pair)
    other, _ = run_on(ScriptedGrid(a, c), recipe(*FOUR, f"federation.rounds={count - 1}"), tmp_path / "other")
    assert bits(server) == bits(other)
    assert (server.base, server.reports) == (other.base, other.reports)


def test_a_missed_quorum_says_it_in_one_printable_line(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    for name in "abc":
        grid.faults["train", 1, name] = error("\x1b[31m\nno")
    with pytest.raises(FederationError) as caught:
        run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert str(caught.value).isprintable()
    assert "\\x1b[31m no" in str(caught.value)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_an_error_is_one_printable_line(text: str) -> None:
    error = FlexpertsError(f"value {text}", f"rule {text}", f"remedy {text}")
    assert str(error).isprintable()
    assert error.value.isprintable()
    assert one_line(text).isprintable()
    assert printable("Zürich, 中文, ß") == "Zürich, 中文, ß"


def test_a_server_s_text_is_escaped_in_a_silo_s_log(caplog: pytest.LogCaptureFixture) -> None:
    for error in (FederationError("\x1b[31m\nx", "y", "z"), ValueError("\x1b[31m\u202ex\r")):
        worker.log.error("%s", worker.logged(error))
    for record in caplog.records:
        assert all(line.isprintable() for line in record.getMessage().split("\n"))
        assert not record.exc_info
