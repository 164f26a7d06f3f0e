"""`flexperts join`: add a silo to a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexperts.cli.data import ColumnsOption, columns_given
from flexperts.cli.generate import Base, Device, Trust, is_exported
from flexperts.cli.interrupted import stoppable


def command(
    run: Annotated[str, typer.Argument(help="Run directory of a finished run.")],
    data: Annotated[
        str, typer.Option(help="The new silo's rows: .jsonl, .json, .csv, .tsv, .parquet or hub:ORG/NAME.")
    ],
    test: Annotated[
        str | None,
        typer.Option(help="Its test rows.", show_default="a share of the passages is held out"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Its name.", show_default="the file's, or its folder's if the file is train.*"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps.", show_default="as many as a participant's in all of the recipe's rounds"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a training.* setting, data.on_bad_row, data.test_fraction or model.template for this "
            "silo; such as training.personal_lr=1e-3. Repeatable.",
        ),
    ] = None,
    columns: ColumnsOption = None,
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of its batches.", show_default="the run's"),
    ] = None,
) -> None:
    """Add a new silo to a finished run: its personal part is trained, the shared weights do not change."""
    from flexperts.artifacts import RunDirectory
    from flexperts.errors import ArtifactError

    if is_exported(run):
        raise ArtifactError(
            run,
            "an exported model has no recipe and no state of the server, from which a newcomer starts",
            "ask the run's operator for config.toml, run_id, summary.json, shared/ and checkpoint.safetensors",
        )
    summary = RunDirectory.open(Path(run)).summary()  # refuse a wrong path before anything heavy loads

    from flexperts.terminal.display import RunDisplay, cut_line

    with stoppable(lambda: "the silo has not joined; run the same command again"), RunDisplay() as display:
        from flexperts.finished.joining import join

        record = join(
            run,
            data,
            test=test,
            name=name,
            steps=steps,
            columns=columns_given(columns),
            settings=settings or (),
            seed=seed,
            base=base,
            trust_remote_code=trust,
            observer=display,
        )
    display.console.print(_table(record, summary))
    if line := cut_line({record["client"]: record["answers"]}):
        display.notice(line)
    display.console.print(
        f"{record['client']} is a client of {run} now: {record['rows']['train_rows']} train rows, "
        f"{record['steps']} steps; nothing was sent",
        markup=False,
        soft_wrap=True,
    )


def _table(record: dict[str, Any], summary: dict[str, Any]) -> Any:
    """Return the table of the new silo's scores and the mean of the participants'."""
    from rich.table import Table

    from flexperts.server.summary import scores_text, scores_title

    states = list(record["rouge_l"])
    title = f"{scores_title('reward_accuracy' in record)}, each on its own scored rows"
    table = Table("", *(state.replace("_", "-") for state in states), title=title, title_justify="left")
    participants = f"mean of {len(summary['clients'])} participants"
    for who, scores in ((record["client"], record), (participants, summary["mean"])):
        table.add_row(who, *(scores_text(scores, s) for s in states))
    return table
