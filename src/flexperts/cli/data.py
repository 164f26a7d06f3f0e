"""`flexperts data`: check rows before a run, and make data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexperts.cli.generate import Trust, sets_trust

app = typer.Typer(no_args_is_help=True, help="Check rows before a run, and make data files.")

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN",
        help="Column of a field (instruction, context, response, category), in place of the recipe's data.columns. "
        "Repeatable.",
    ),
]
Planned = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe of the planned run.", show_default="default settings"),
]


def columns_given(texts: list[str] | None) -> dict[str, str] | None:
    """Return the field -> column of a command line, or None."""
    from flexperts.errors import ConfigError

    for text in texts or ():
        if "=" not in text:
            raise ConfigError(f"--columns {text}", "it must be FIELD=COLUMN", "write it like instruction=question")
    return {field.strip(): column for field, _, column in (t.partition("=") for t in texts)} if texts else None


@app.callback()
def _group() -> None:
    """Check rows before a run, and make data files."""


@app.command("check")
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE | FILE | SILO.toml",
            help="A recipe, one silo's rows (.jsonl, .json, .csv, .tsv, .parquet, hub:ORG/NAME), or a silo's file.",
        ),
    ],
    test: Annotated[str | None, typer.Option(help="Test rows, where FILE has train rows.")] = None,
    columns: ColumnsOption = None,
    recipe: Planned = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON; no row is in it.")] = False,
    no_example: Annotated[
        bool, typer.Option("--no-example", help="Show no row; without a terminal, none is shown.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Read, check and encode rows as a run does, without the base's weights, and show what is in them.

    The exit code is 2 where `flexperts run` would refuse.
    """
    from flexperts.cli.checking import checked, planned_run, print_report, raise_last
    from flexperts.recipe import check_trust

    kind, config = planned_run(source, recipe, settings or (), test=test, columns=columns_given(columns))
    if kind != "silo":  # a silo's own file decides for its machine
        check_trust(config, Path(source), trusted=trust or sets_trust(settings or ()))
    found = checked(config, whole=kind == "recipe")
    print_report(found, kind, source, as_json=as_json, example=not no_example)
    raise_last(found.errors)


@app.command("make-silos")
def make_silos(
    folder: Annotated[Path, typer.Argument(help="Folder to write <silo>/train.jsonl and <silo>/test.jsonl into.")],
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    train_rows: Annotated[int, typer.Option(help="Train rows per silo.")] = 96,
    test_rows: Annotated[int, typer.Option(help="Test rows per silo.")] = 40,
) -> None:
    """Write the data of the quick start: four silos whose house styles conflict."""
    from flexperts.data.silos.generate import write_silos

    for path in write_silos(folder, seed, train_rows, test_rows):
        typer.echo(path)
