"""`flexperts inspect`: a model's experts and projections, and the parameters that a recipe would train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexperts.cli.generate import Device

if TYPE_CHECKING:
    from rich.table import Table

    from flexperts.modeling.quantization import Storage


def command(
    model: Annotated[str, typer.Argument(help="A shipped base, a transformers folder or a hub id.")],
    method: Annotated[str, typer.Option(help="Method whose split is shown.")] = "flex",
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as lora.rank=16."),
    ] = [],  # noqa: B006 - typer copies it
    device: Device = None,
) -> None:
    """Show a model's experts modules, its attention projections, and the split of its parameters."""
    from flexperts.client.model import ClientModel
    from flexperts.methods.registry import make_method
    from flexperts.modeling.load import load_base
    from flexperts.modeling.quantization import storage
    from flexperts.moe.attention import attention_linears
    from flexperts.recipe import parse_recipe

    config = parse_recipe("data.silos = {}", [f"method.name={method}", *settings, f"model.base={model!r}"])
    chosen = make_method(config.method)
    base = load_base(config.model)
    projections = attention_linears(base.model)  # before LoRA takes their place
    stored = storage(base.model)
    _show(base, ClientModel(base, config, chosen), projections, stored)


def _show(base: Any, model: Any, projections: Sequence[str], stored: Sequence[Storage]) -> None:
    from rich.table import Column, Table

    from flexperts.methods.kit.turn import Prepared
    from flexperts.terminal.console import console as terminal
    from flexperts.terminal.display import split_table

    console = terminal()
    kind = type(base.model).__name__
    console.print(f"{kind} from {base.source}, fingerprint {base.fingerprint[:12]}", soft_wrap=True)
    kinds = ", ".join(sorted({f"{type(e.module).__name__} in {e.dtype}" for e in model.experts}))
    table = Table(Column("experts module", overflow="fold"), "experts", "width", title=kinds, title_justify="left")
    for experts in model.experts:
        table.add_row(experts.name, str(experts.num_experts), str(experts.width))
    if model.experts:
        console.print(table)
    console.print(_storage_table(stored))
    targets = Counter(name.rsplit(".", 1)[-1] for name in projections)
    console.print("attention projections:", ", ".join(f"{count} {name}" for name, count in targets.items()))
    # The experts that a client chooses depend on its rows; the number of parameters does not.
    first = {e.name: tuple(range(model.config.graft.experts)) for e in model.experts}
    with model.lend(model.site("inspect", [], Prepared(first)), {}) as (split, _):
        console.print(split_table(model.method.name, split.describe()))


def _storage_table(rows: Sequence[Storage]) -> Table:
    """Return the table of how a loaded base is stored, part by part."""
    from rich.table import Table

    from flexperts.reports.cells import size

    table = Table("weights", "type", title="how the base is stored", title_justify="left")
    for column in ("full", "stored"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.part, ", ".join(row.types), size(row.before).text, size(row.after).text)
    return table
