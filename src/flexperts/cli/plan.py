"""`flexperts plan`: the costs of methods on a model, without loading its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer


def command(
    model: Annotated[str, typer.Argument(help="A config that ships, a config.json or its folder, or a hub id.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods, or all.", show_default="the usual comparison")
    ] = "",
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 4,
    link: Annotated[
        str,
        typer.Option(metavar="RATE", help="Each client's link, in either direction: 10Mbit/s, 1Gbit/s."),
    ] = "100Mbit/s",
    bandwidth: Annotated[float | None, typer.Option(hidden=True, help="Use --link.")] = None,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as lora.rank=16. Repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    gpu: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Show instead what fits a card of this memory, such as 24GB or 80GiB."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Plan bytes, memory, FLOPs and time of methods on a model, from its config alone."""
    import json
    from dataclasses import asdict

    from flexperts.costs.plan import plan

    if gpu is not None:
        _show_card(model, gpu, settings, as_json)
        return
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if bandwidth is not None:
        typer.echo("--bandwidth is replaced by --link, and will be removed in 0.3: --link 10Mbit/s", err=True)
    rate = _rate(link) if bandwidth is None else bandwidth
    made = plan(model, names, settings, clients=clients, bandwidth=rate)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2))
        return
    _show(made)


def _rate(link: str) -> float:
    """Return a link's rate in Mbit/s."""
    import re

    from flexperts.errors import ConfigError

    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG])bit/s", link)
    if found is None:
        rule = "a rate is a number with kbit/s, Mbit/s or Gbit/s"
        raise ConfigError(f"--link {link!r}", rule, "write it as 10Mbit/s")
    return float(found[1]) * {"k": 1e-3, "M": 1.0, "G": 1e3}[found[2]]


def _show(made: Any) -> None:
    from flexperts.terminal.console import console as terminal

    console = terminal()
    facts = made.model
    console.print(
        f"{facts.name}: {_count(facts.parameters)} parameters, {_count(facts.active_parameters)} active; "
        f"{facts.moe_layers} MoE layers, {facts.experts_per_token} of {facts.experts} experts per token; "
        f"{_count(facts.flops_per_token)} FLOPs per token forward",
        soft_wrap=True,
    )
    for table in _tables(made):
        console.print(table)
    total = "up and down over each client's own link, in one round and in all messages of a run"
    console.print(
        f"{made.clients} clients, {made.bandwidth:g} Mbit/s; seconds: {total}; memory without activations"
    )
    notes = [(facts.name, facts.note), *((m.name, m.note) for m in made.methods), *made.refused.items()]
    for name, note in notes:
        if note:
            console.print(f"{name}: {note}", soft_wrap=True)


def _show_card(model: str, gpu: str, settings: Sequence[str], as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from flexperts.costs.cards import CONTEXT, FRAGMENTATION, CardPlanner, card_bytes
    from flexperts.reports.cells import size
    from flexperts.terminal.console import console as terminal

    card, planner = card_bytes(gpu), CardPlanner(model, settings)
    fits = list(planner.fits(card))
    if as_json:
        found = [{**asdict(fit), "fits": fit.on(card)} for fit in fits]
        facts = {"card": card, "margin": CONTEXT, "fragmentation": FRAGMENTATION, "max_length": planner.max_length}
        typer.echo(json.dumps({"model": planner.facts.name, **facts, "rows": found}, indent=2))
        return
    columns = {
        "rank": lambda fit: "whole" if fit.rank == "full" else fit.rank,
        "fits": lambda fit: "yes" if fit.on(card) else "no",
        "rows": lambda fit: f"{fit.rows}{' *' if fit.rows and fit.checkpointing else ''}",
        "evaluated": lambda fit: str(fit.evaluation_rows),
        "training": lambda fit: size(fit.training).text,
        "evaluation": lambda fit: size(fit.evaluation).text,
        "loading": lambda fit: size(fit.loading).text,
        "host": lambda fit: size(fit.host).text,
    }
    console = terminal()
    console.print(_table(f"{planner.facts.name} on a card of {size(card).text}", columns, fits, "experts"))
    console.print(
        f"rows: most in one pass, of {planner.max_length} tokens (training.max_length), half of them the response; "
        f"* with training.gradient_checkpointing. Memory with so many rows, or with one, and with "
        f"{size(CONTEXT).text} and {FRAGMENTATION:.0%} of all but the base as margin. Estimates: no card was used.",
        soft_wrap=True,
    )


def _tables(made: Any) -> Iterator[Any]:
    """Yield traffic and needs as two tables: one table would not fit a terminal of 80 columns."""
    from flexperts.reports.cells import size

    moves = {
        "shared": lambda row: _count(row.shared),
        "up": lambda row: size(row.uplink).text,
        "down": lambda row: size(row.downlink).text,
        "seconds": lambda row: _seconds(row.seconds),
        "at the server": lambda row: size(row.at_server).text,
    }
    takes = {
        "personal": lambda row: _count(row.personal),
        "memory": lambda row: size(row.memory.total).text,
        "on disk": lambda row: size(row.personal_state).text,
        "run, s": lambda row: _seconds(row.run_seconds) if row.method else "",
        "FLOPs": lambda row: f"{100 * row.overhead:+.2f} %",
    }
    yield _table("one client, one round with weights: what is sent", moves, made.methods)
    yield _table("one client: what it needs", takes, made.methods)


def _table(
    title: str, columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any], named: str = "method"
) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(named)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(cell(row) for cell in columns.values()))
    return table


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _count(value: float) -> str:
    """Return a count as text: plain, or in thousands (k), millions (M), billions (G) or trillions (T)."""
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} T"
