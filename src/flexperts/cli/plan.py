"""`flexperts plan`: what every method would cost on a model that need not be on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    model: Annotated[str, typer.Argument(help="A config that ships, a config.json or its folder, or a hub id.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods, or all.", show_default="the usual comparison")
    ] = "",
    clients: Annotated[int, typer.Option(help="Clients.")] = 4,
    bandwidth: Annotated[float, typer.Option(help="Mbit/s of each client's link, in either direction.")] = 100.0,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as lora.rank=16. Repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Plan bytes, memory, FLOPs and time of methods on a model, from its config alone."""
    import json
    from dataclasses import asdict

    from flexperts.costs.plan import plan

    names = [name.strip() for name in methods.split(",") if name.strip()]
    made = plan(model, names, settings, clients=clients, bandwidth=bandwidth)
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2))
        return
    _show(made)


def _show(made: Any) -> None:
    from rich.console import Console

    console = Console()
    facts = made.model
    console.print(
        f"{facts.name}: {_count(facts.parameters)} parameters, {_count(facts.active_parameters)} active; "
        f"{facts.moe_layers} MoE layers, {facts.experts_per_token} of {facts.experts} experts per token; "
        f"{_count(facts.flops_per_token)} FLOPs per token forward",
        markup=False,
        soft_wrap=True,
    )
    console.print(_table(made))
    total = "up and down over each client's own link"
    console.print(
        f"{made.clients} clients, {made.bandwidth:g} Mbit/s; seconds: {total}; memory without activations"
    )
    notes = [(facts.name, facts.note), *((m.name, m.note) for m in made.methods), *made.refused.items()]
    for name, note in notes:
        if note:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)


def _table(made: Any) -> Any:
    from rich.table import Table

    from flexperts.reports.cells import size

    table = Table(title="one client, one round", title_justify="left")
    table.add_column("method")
    for column in ("shared", "personal", "up", "down", "seconds", "memory", "on disk", "FLOPs", "at the server"):
        table.add_column(column, justify="right")
    for row in made.methods:
        table.add_row(
            row.name,
            _count(row.shared),
            _count(row.personal),
            size(row.uplink).text,
            size(row.downlink).text,
            _seconds(row.seconds),
            size(row.memory.total).text,
            size(row.personal_state).text,
            f"{100 * row.overhead:+.2f} %",
            size(row.at_server).text,
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _count(value: float) -> str:
    """Return a count as text: as it is, or in thousands (k), millions (M), billions (G) or more (T)."""
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} T"
