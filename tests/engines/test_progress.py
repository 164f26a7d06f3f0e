"""Events of clients whose turns are in worker processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from flexperts.config.run import RunConfig
from flexperts.engines import fork_server
from flexperts.engines.fork_server import Remote
from flexperts.engines.run import run_federation
from flexperts.observer import Relay, TurnState
from flexperts.terminal.display import RunDisplay

Recipe = Callable[..., RunConfig]


def test_a_worker_sends_few_states_of_a_turn_and_always_the_last(monkeypatch: Any) -> None:
    monkeypatch.setattr(fork_server, "time", SimpleNamespace(monotonic=lambda: now))
    reader, writer = Pipe(duplex=False)
    remote, now = Remote(writer), 1.0
    for step in range(1, 31):
        now += 0.0625
        remote.turn(TurnState("a", "training", "round 1", step, 30))
    remote.turn_ended("a")
    heard = []
    while reader.poll():
        heard.append(reader.recv())
    assert heard.pop() == ("event", "turn_ended", "a")
    assert [event[1] for event in heard] == ["turn"] * len(heard)
    assert [event[2].done for event in heard] == [1, 5, 9, 13, 17, 21, 25, 29, 30]


def test_a_run_with_two_workers_shows_both_turns(recipe: Recipe, tmp_path: Path) -> None:
    text, heard, at_once = io.StringIO(), [], []
    display = RunDisplay(Console(file=text, width=200))

    def hear(event: str, *arguments: Any) -> None:
        getattr(display, event)(*arguments)
        heard.append((event, *arguments))
        lines = display._here.lines()
        at_once.append({line.text.split(":")[0].strip() for line in lines[1:]})

    config = recipe("engine.workers=2", "engine.threads=1", "training.local_steps=12", "evaluation.rows=2")
    summary = run_federation(config, tmp_path / "run", Relay(hear))
    clients = set(summary["clients"])
    assert max(map(len, at_once)) == 2
    phases = [event[1:] for event in heard if event[0] == "phase"]
    everyone = len(clients)
    assert phases == [
        ("joining", everyone, 0, 0),
        ("training", everyone, 1, 2),
        ("training", everyone, 2, 2),
        ("evaluation", everyone, 2, 2),
    ]
    last = [event[1] for event in heard if event[0] == "turn" and event[1].done == event[1].total > 0]
    kinds = {(state.client, state.phase) for state in last}
    assert kinds == {(name, phase) for name in clients for phase in ("selection", "training", "evaluation")}
    trained = [state for state in last if state.phase == "training"]
    assert all(state.loss is not None and state.tokens > 0 for state in trained)
    assert {state.text for state in trained} == {"round 1", "round 2"}
    assert sum(event[0] == "turn_ended" for event in heard) >= 3 * everyone  # two rounds, and the evaluation
    loads = [event for event in heard if event == ("stage", f"loading {config.model.base}")]
    assert len(loads) == 1  # told by the process that loads it
    assert f"loading {config.model.base}" in text.getvalue().splitlines()
