"""A run's estimated memory, shown before anything loads; a run that does not fit is refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from flexperts.config.run import RunConfig
    from flexperts.costs.preflight import Preflight
    from flexperts.data.tables import Given

_SMALL = 1_000_000_000
"""Size in bytes below which a checkpoint's memory is not estimated."""


def check_memory(config: RunConfig, given: Given | None = None, *, console: Console | None = None) -> RunConfig:
    """Show the memory that a run of a large base needs, and refuse the run if it is not free.

    Args:
        config: The run.
        given: Rows that a Python program has given.
        console: Where to; stdout by default.

    Returns:
        The run, with the number of workers that fit if it leaves that open.
    """
    from flexperts.errors import FlexpertsError
    from flexperts.smol_moe.build import resolve_base
    from flexperts.terminal.console import console as terminal

    model, console = config.model, console or terminal()
    if not model.preflight or model.trust_remote_code or _is_small(Path(resolve_base(model.base))):
        return config
    from flexperts.client.workspace import Workspace
    from flexperts.costs.activations import row_lengths
    from flexperts.costs.preflight import Estimator, check_fits, with_workers_that_fit
    from flexperts.data.clients import load_clients

    try:
        clients = load_clients(config.data, config.seed, given=given)
        workspace = Workspace(config, given=given or {})
        estimator = Estimator(model.base, list(clients), row_lengths(workspace, clients))
        made = estimator.estimate(config)
    except FlexpertsError as error:  # the run itself will report the error
        console.print(f"memory: not estimated ({error})", soft_wrap=True)
        return config
    console.print(_table(made))
    check_fits(made, {} if made.peak.total <= made.free else estimator.savings(config))
    return with_workers_that_fit(config, made)


def clients_in_memory(
    config: RunConfig, clients: Collection[str], asked: int | None, *, max_rows: int, max_tokens: int
) -> int | None:
    """Return how many clients' models a server may keep in memory; refuse a large base that does not fit.

    Args:
        config: The run.
        clients: Names of its clients.
        asked: The user's number; None means as many as fit.
        max_rows, max_tokens: As for ``open_engine``.
    """
    from flexperts.costs.serving import serving_memory
    from flexperts.errors import FlexpertsError
    from flexperts.smol_moe.build import resolve_base
    from flexperts.terminal.console import console as terminal

    model = config.model
    if not model.preflight or model.trust_remote_code or _is_small(Path(resolve_base(model.base))):
        return asked
    try:
        made = serving_memory(config, sorted(clients), max_rows=max_rows, max_tokens=max_tokens)
    except FlexpertsError as error:  # loading will report the error
        terminal(stderr=True).print(f"memory: not estimated ({error})", soft_wrap=True)
        return asked
    most = made.clients_in_memory(asked)
    if most < made.clients:
        terminal(stderr=True).print(
            f"memory: the models of {most} of {made.clients} clients at a time", soft_wrap=True
        )
    return most


def _is_small(folder: Path) -> bool:
    """Return whether a checkpoint is a small local one; sizes on the hub are not known."""
    return folder.is_dir() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < _SMALL


def _table(made: Preflight) -> Any:
    from rich.table import Table

    from flexperts.reports.cells import size

    table = Table(
        title=f"memory on {made.device}: {size(made.peak.total).text} of {size(made.free).text} free",
        title_justify="left",
        caption=f"a server on a separate machine: {size(made.server).text}",
        caption_justify="left",
    )
    table.add_column("at the peak of")
    for need in made.needs:
        table.add_column(need.phase, justify="right")
    for part in dict.fromkeys(part for need in made.needs for part in need.parts):
        table.add_row(part, *(size(need.parts[part]).text if part in need.parts else "" for need in made.needs))
    table.add_section()
    table.add_row("together", *(size(need.total).text for need in made.needs))
    return table
