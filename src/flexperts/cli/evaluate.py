"""`flexperts evaluate`: score a finished run's models again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer


def command(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Score every client's model of a finished run again, from its files, on the rows that the recipe scores."""
    from flexperts.artifacts import RunDirectory

    RunDirectory.open(run).summary()  # say what is wrong with the path before anything heavy loads

    from flexperts.cli.display import RunDisplay
    from flexperts.federation.trained import TrainedRun

    with RunDisplay() as display:
        display.stage("reading rows, loading the base")
        trained = TrainedRun(run)
        display.stage(f"scoring {len(trained.clients)} clients")
        scores = trained.evaluate(display)
    display.console.print(_table(scores, trained.joined))


def _table(scores: dict[str, Any], joined: Collection[str]) -> Any:
    from rich.table import Table

    states = list(next(iter(scores.values())))
    table = Table("client", *states, title="ROUGE-L (NLL) on each client's own scored rows", title_justify="left")
    for client, by_state in scores.items():
        label = f"{client} (joined)" if client in joined else client
        table.add_row(label, *(f"{by_state[s].rouge_l:.1f} ({by_state[s].nll:.2f})" for s in states))
    return table
