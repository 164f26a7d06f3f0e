"""`flexperts status`: where a run is, read from its directory; the process that writes it is not asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    from flexperts.server.status import status
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


def _watch(run: RunDirectory, console: Console) -> None:
    """Show the status until no process writes the run: drawn again in a terminal, else a line for every round."""
    from rich.live import Live

    from flexperts.server.status import status

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
