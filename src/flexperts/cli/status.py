"""`flexperts status`: where a run is, read from its directory; the process that writes it is not asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexperts.progress import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from flexperts.artifacts import RunDirectory

_EVERY = 2.0
"""Seconds between two looks."""
_SHOWN = 5
"""Most rounds in the table, the last ones."""


def command(
    run: Annotated[str, typer.Argument(help="Run directory, or the name of a deployed run on its server.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again until no process writes the run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")] = False,
) -> None:
    """Show rounds, late and refused silos, seconds, bytes and epsilon of a run, while it runs or later."""
    from flexperts.artifacts import RunDirectory
    from flexperts.deployment.settings import run_folder
    from flexperts.errors import ConfigError
    from flexperts.files import json_text
    from flexperts.terminal.console import console

    if watch and as_json:
        raise ConfigError("--watch with --json", "the value is printed once", "leave one of them out")
    path = Path(run)
    directory = RunDirectory.open(
        path if (path / "config.toml").is_file() or path.parent != Path() else run_folder(run)
    )
    if as_json:
        typer.echo(json_text(status(directory), indent=2))
    elif watch:
        _watch(directory, console())
    else:
        console().print(_shown(status(directory)))


def status(run: RunDirectory) -> dict[str, Any]:
    """Return where a run is, as plain JSON.

    Returns:
        ``state`` ("running", "stopped", "finished") and ``writer``, the process that writes it, if there is one;
        ``rounds`` done and planned; ``seconds_since`` the last round; ``bytes`` up and down of all rounds;
        ``epsilon`` after the last one, None without noise; ``silos`` and ``last_rounds`` as in the tables.
    """
    from flexperts.files import writer
    from flexperts.recipe import recorded_recipe

    recipe, rounds = recorded_recipe(run.path), run.finished_rounds(run.written_rounds())
    held, written = writer(run.path), run.last_round_at()
    return {
        "run": run.path.resolve().name,
        "method": recipe.method.name,
        "state": "finished" if run.is_finished else "running" if held else "stopped",
        "writer": held,
        "rounds": {"done": len(rounds), "planned": rounds[-1]["planned"] if rounds else recipe.federation.rounds},
        "seconds_since": None if written is None else max(0.0, time.time() - written),
        "bytes": {way: sum(sum(one[way].values()) for one in rounds) for way in ("uplink", "downlink")},
        "epsilon": _epsilon(rounds[-1]) if rounds else None,
        "silos": _silos(rounds),
        "last_rounds": [_round(one) for one in rounds[-_SHOWN:]],
    }


def _silos(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by silo, in how many rounds it was drawn, used, missing, refused, and the last one that used it."""
    found: dict[str, dict[str, Any]] = {}
    for one in rounds:
        for name in {*one["participants"], *one["clients"], *one["refused"]}:
            silo = found.setdefault(
                name,
                {"drawn": 0, "used": 0, "missing": 0, "refused": 0, "last_used": None, "loss": None, "late": False},
            )
            told = one["clients"].get(name)
            silo["drawn"] += name in one["participants"]
            silo["missing"] += name in one["missing"]
            silo["refused"] += name in one["refused"]
            silo["late"] = name in one["missing"]
            if told is not None:
                silo |= {"used": silo["used"] + 1, "last_used": one["number"], "loss": told.get("loss")}
    return dict(sorted(found.items()))


def _round(one: Mapping[str, Any]) -> dict[str, Any]:
    losses = [told["loss"] for told in one["clients"].values() if told.get("loss") is not None]
    return {
        "number": one["number"],
        "used": len(one["clients"]),
        "drawn": len(one["participants"]),
        "loss": mean(losses) if losses else None,
        "seconds": one["seconds"],
        "bytes": {way: sum(one[way].values()) for way in ("uplink", "downlink")},
        "epsilon": _epsilon(one),
    }


def _epsilon(one: Mapping[str, Any]) -> float | None:
    return None if one["privacy"] is None else float(one["privacy"]["epsilon"])


def _watch(run: RunDirectory, console: Console) -> None:
    """Show the status until no process writes the run: drawn again in a terminal, else a line for every round."""
    from rich.live import Live

    if console.is_interactive:
        with Live(console=console, auto_refresh=False) as live:
            while (found := status(run))["state"] == "running":
                live.update(_shown(found), refresh=True)
                time.sleep(_EVERY)
            live.update(_shown(found), refresh=True)
        return
    told = ""
    while True:
        found = status(run)
        if (line := _line(found, since=False)) != told:
            told = line
            console.print(line, soft_wrap=True)
        if found["state"] != "running":
            return
        time.sleep(_EVERY)


def _line(found: Mapping[str, Any], *, since: bool = True) -> str:
    """Return a status in one line."""
    rounds, last = found["rounds"], found["last_rounds"]
    by = f" ({found['writer']})" if found["state"] == "running" else ""
    facts = [
        f"{found['run']}, {found['method']}: {found['state']}{by}",
        f"{rounds['done']} of {rounds['planned']} rounds",
    ]
    if last:
        facts.append(f"a round takes {duration(mean(sum(one['seconds'].values()) for one in last))}")
    if since and found["seconds_since"] is not None and found["state"] != "finished":
        facts.append(f"the last one ended {duration(found['seconds_since'])} ago")
    if late := [name for name, silo in found["silos"].items() if silo["late"]]:
        facts.append(f"missing in their last round: {', '.join(late)}")
    return "; ".join(facts)


def _shown(found: Mapping[str, Any]) -> RenderableType:
    """Return the line and two tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from flexperts.reports.cells import number, significant, size

    silos = Table("silo", title="silos", title_justify="left")
    for column in ("drawn", "used", "missing", "refused", "last used", "loss"):
        silos.add_column(column, justify="right")
    for name, its in found["silos"].items():
        counts = (str(its[key]) for key in ("drawn", "used", "missing", "refused"))
        silos.add_row(Text(name), *counts, str(its["last_used"] or "–"), number(its["loss"], 3).text)
    rounds = Table("round", title="last rounds", title_justify="left")
    for column in ("silos", "loss", "training", "evaluation", "sent", "received", "epsilon"):
        rounds.add_column(column, justify="right")
    for one in found["last_rounds"]:
        spent = (duration(one["seconds"][phase]) for phase in ("training", "evaluation"))
        sizes = (size(one["bytes"][way]).text for way in ("uplink", "downlink"))
        used = f"{one['used']} of {one['drawn']}"
        rounds.add_row(
            str(one["number"]), used, number(one["loss"], 3).text, *spent, *sizes, significant(one["epsilon"]).text
        )
    return Group(Text(_line(found)), *((silos, rounds) if found["last_rounds"] else ()))
