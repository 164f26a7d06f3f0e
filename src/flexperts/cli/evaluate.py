"""`flexperts evaluate`: score a finished run's models again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flexperts.cli.generate import Base, Device, Trust
from flexperts.cli.run import Workers


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
    workers: Workers = None,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Score clients' models of a finished run again, from its files, on its scored rows or on others."""
    from flexperts.artifacts import RunDirectory
    from flexperts.recipe import engine_settings

    engine = engine_settings(workers)
    RunDirectory.open(run).summary()  # refuse a wrong path before anything heavy loads

    from flexperts.observer import observing
    from flexperts.reports.reading import STATES
    from flexperts.terminal.display import RunDisplay

    with RunDisplay() as display, observing(display):
        from flexperts.engines.scoring import score_run
        from flexperts.server.summary import not_finite_of

        found = score_run(run, data, base=base, trust_remote_code=trust, engine=engine)
    display.console.print(_table(found.scores, found.marks))
    cut = {client: [*its.values()][-1].cut for client, its in found.scores.items()}
    if shown := ", ".join(f"{client} {count}" for client, count in cut.items() if count):
        display.notice(f"answers cut at {found.limit} tokens: {shown}")
    for client, its in found.scores.items():
        for state, why in not_finite_of(its).items():
            display.notice(f"{client}, {STATES.get(state, state)}: no score; {why}")


def _table(scores: Mapping[str, Mapping[Any, Any]], marks: Mapping[str, str]) -> Any:
    from rich.table import Table

    from flexperts.reports.reading import STATES
    from flexperts.server.summary import score_text, scores_title

    others = any("other rows" in mark for mark in marks.values())
    rows = "rows given here, not all of them the run's" if others else "each client's own scored rows"
    states = list(next(iter(scores.values())))
    columns = [STATES.get(state, state) for state in states]
    what = scores_title(any(its[states[0]].margins for its in scores.values()))
    table = Table("client", *columns, title=f"{what} on {rows}", title_justify="left")
    for client, by_state in scores.items():
        shown = (score_text(by_state[s].rouge_l, by_state[s].nll, by_state[s].reward_accuracy) for s in states)
        table.add_row(f"{client}{marks.get(client, '')}", *shown)
    return table
