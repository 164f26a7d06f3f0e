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
    from flexperts.federation.answer_limit import answer_limit, check_limit
    from flexperts.federation.not_finite import reasons_of
    from flexperts.federation.trained import TrainedRun

    with RunDisplay() as display:
        display.stage("reading rows, loading the base")
        trained = TrainedRun(run)
        display.stage(f"scoring {len(trained.clients)} clients")
        check_limit(trained.workspace, trained.config, display)
        scores = trained.evaluate(display)
    display.console.print(_table(scores, trained.joined))
    cut = {client: [*its.values()][-1].cut for client, its in scores.items()}
    if shown := ", ".join(f"{client} {count}" for client, count in cut.items() if count):
        display.notice(f"answers cut at {answer_limit(trained.workspace, trained.config)} tokens: {shown}")
    for client, its in scores.items():
        for state, why in reasons_of(its).items():
            display.notice(f"{client}, {state}: no score; {why}")


def _table(scores: dict[str, Any], joined: Collection[str]) -> Any:
    from rich.table import Table

    from flexperts.federation.summary import score_text

    states = list(next(iter(scores.values())))
    table = Table("client", *states, title="ROUGE-L (NLL) on each client's own scored rows", title_justify="left")
    for client, by_state in scores.items():
        label = f"{client} (joined)" if client in joined else client
        table.add_row(label, *(score_text(by_state[s].rouge_l, by_state[s].nll) for s in states))
    return table
