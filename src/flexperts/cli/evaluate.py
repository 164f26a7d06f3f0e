"""`flexperts evaluate`: score a finished run's models again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flexperts.cli.generate import Base, Trust


def command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FOLDER | NAME=FILE",
            help="Other rows: the folder that the recipe's files are in now, or one client's rows. Repeatable; "
            "clients without rows are left out.",
            show_default="the recipe's files",
        ),
    ] = [],  # noqa: B006 - typer copies it
    base: Base = None,
    trust: Trust = False,
) -> None:
    """Score clients' models of a finished run again, from its files, on its scored rows or on others."""
    from flexperts.artifacts import RunDirectory

    RunDirectory.open(run).summary()  # refuse a wrong path before anything heavy loads

    from flexperts.cli.display import RunDisplay
    from flexperts.observer import observing

    with RunDisplay() as display, observing(display):
        from flexperts.client.answer_limit import answer_limit, check_limit
        from flexperts.finished.elsewhere import rows_elsewhere, said
        from flexperts.finished.trained import TrainedRun
        from flexperts.server.summary import not_finite_of

        trained = TrainedRun(run, base=base, trust_remote_code=trust)
        display.stage("reading rows")
        given = rows_elsewhere(trained, data) if data else {}
        for line in said(given):
            display.notice(line)
        rows = {name: its.rows for name, its in given.items()} if data else trained.own_rows()
        if not data:
            check_limit(trained.workspace, trained.config, display)
        display.stage(f"scoring {len(rows)} clients")
        scores = trained.evaluate(display, rows)
    marks = dict.fromkeys(trained.joined, " (joined)")
    marks |= {n: f"{marks.get(n, '')} (other rows)" for n, its in given.items() if not its.own}
    display.console.print(_table(scores, marks))
    cut = {client: [*its.values()][-1].cut for client, its in scores.items()}
    if shown := ", ".join(f"{client} {count}" for client, count in cut.items() if count):
        display.notice(f"answers cut at {answer_limit(trained.workspace, trained.config)} tokens: {shown}")
    for client, its in scores.items():
        for state, why in not_finite_of(its).items():
            display.notice(f"{client}, {state}: no score; {why}")


def _table(scores: dict[str, Any], marks: Mapping[str, str]) -> Any:
    from rich.table import Table

    from flexperts.server.summary import score_text

    others = any("other rows" in mark for mark in marks.values())
    rows = "rows given here, not all of them the run's" if others else "each client's own scored rows"
    states = list(next(iter(scores.values())))
    table = Table("client", *states, title=f"ROUGE-L (NLL) on {rows}", title_justify="left")
    for client, by_state in scores.items():
        shown = (score_text(by_state[s].rouge_l, by_state[s].nll) for s in states)
        table.add_row(f"{client}{marks.get(client, '')}", *shown)
    return table
