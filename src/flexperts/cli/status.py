"""`flexperts status`: where a run is, read from its directory; the process that writes it is not asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexperts.progress import Line, duration
from flexperts.serving.http.settings import Address

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from flexperts.status.status import RunStatus

_EVERY = 2.0
"""Seconds between two looks."""
Host = Annotated[
    str | None,
    typer.Option(help="With --ui: address or name to listen on.", show_default="127.0.0.1: this machine alone"),
]
Port = Annotated[int | None, typer.Option(help="With --ui: the page's port.", show_default="a free one")]


def command(
    run: Annotated[str, typer.Argument(help="Run directory, or the name of a deployed run on its server.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again until no process writes the run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a page that follows the run, until Ctrl-C.")] = False,
    host: Host = None,
    port: Port = None,
) -> None:
    """Show rounds, late and refused silos, seconds, bytes and epsilon of a run, while it runs or later."""
    from flexperts.artifacts import RunDirectory
    from flexperts.deployment.settings import run_folder
    from flexperts.errors import ConfigError
    from flexperts.files import json_text
    from flexperts.status.status import RunStatus
    from flexperts.terminal.console import console

    asked = [option for option, given in (("--watch", watch), ("--json", as_json), ("--ui", ui)) if given]
    if len(asked) > 1:
        raise ConfigError(" with ".join(asked), "each shows the status in its own way", "leave all but one out")
    address = page_address(ui, host, port)
    path = Path(run)
    directory = RunDirectory.open(
        path if (path / "config.toml").is_file() or path.parent != Path() else run_folder(run)
    )
    status = RunStatus(directory)
    if address is not None:
        with suppress(KeyboardInterrupt), page(directory.path, address, "until Ctrl-C"):
            while True:
                time.sleep(1)
    elif as_json:
        typer.echo(json_text(status.look(), indent=2))
    elif watch:
        _watch(status, console())
    else:
        console().print(_shown(status.look()))


def page_address(ui: bool, host: str | None, port: int | None) -> Address | None:
    """Return where the page of ``--ui`` is served; None without one."""
    from flexperts.errors import ConfigError

    given = [f"--{name} {value}" for name, value in (("host", host), ("port", port)) if value is not None]
    if given and not ui:
        raise ConfigError(" ".join(given), "it says where the page is served, and there is none", "add --ui")
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError(
            f"--port {port}", "ports are numbers from 0 to 65535", "choose one of them; 0 picks a free one"
        )
    return Address(host or Address.host, port or 0) if ui else None


@contextmanager
def page(
    path: Path, address: Address, until: str, under_way: Callable[[], Sequence[Line]] = lambda: ()
) -> Iterator[None]:
    """Serve the page of a run inside the block, and print its link.

    Args:
        path: The run directory; it need not exist yet.
        address: Where to listen.
        until: Until when, for the line with the link.
        under_way: Returns what the run does now, where it is in this process.
    """
    from flexperts.errors import optional

    with optional("serve", "the page of --ui"):
        from flexperts.serving.run_page.server import page_of
    with page_of(path, address, under_way) as link:
        if not address.is_loopback:
            warning = "other machines can reach the page, and its link and numbers are sent unencrypted"
            typer.echo(f"{warning}: use ssh -L and no --host instead", err=True)
        typer.echo(f"page of the run, {until}: {link}", err=True)
        yield


def _watch(status: RunStatus, console: Console) -> None:
    """Show the status until no process writes the run: drawn again in a terminal, else a line for every round."""
    from rich.live import Live

    if console.is_interactive:
        with Live(console=console, auto_refresh=False) as live:
            while (found := status.look())["state"] == "running":
                live.update(_shown(found), refresh=True)
                time.sleep(_EVERY)
            live.update(_shown(found), refresh=True)
        return
    told = ""
    while True:
        found = status.look()
        if (line := _line(found, since=False)) != told:
            told = line
            console.print(line, soft_wrap=True)
        if found["state"] != "running":
            return
        time.sleep(_EVERY)


def _line(found: Mapping[str, Any], *, since: bool = True) -> str:
    """Return a status in one line."""
    rounds = found["rounds"]
    by = f" ({found['writer']})" if found["state"] == "running" else ""
    facts = [
        f"{found['run']}, {found['method']}: {found['state']}{by}",
        f"{rounds['done']} of {rounds['planned']} rounds",
    ]
    if found["round_seconds"] is not None:
        facts.append(f"a round takes {duration(found['round_seconds'])}")
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
