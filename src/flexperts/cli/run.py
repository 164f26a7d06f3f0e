"""`flexperts run`: a recipe becomes a run directory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Optional

import typer


def command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), such as recipes/quickstart.toml.")],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads this at run time
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, such as training.lr=1e-3. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run directory to create.", show_default="runs/<recipe>-<time>"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the broken-off run that --out holds.")] = False,
    track: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="TRACKER",
            help="Log every round with tensorboard (files in the run directory), or with wandb, mlflow, comet_ml, "
            "trackio, swanlab, aim if it is installed. These may send what they get to a server: the recipe, "
            "clients' names, losses, scores, sizes and times, never texts, weights or tensors; what they collect "
            "by themselves, such as terminal output, their own settings say. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run a recipe: train, average, evaluate, and write a run directory."""
    from flexperts.errors import ConfigError
    from flexperts.recipe import load_recipe

    if resume and out is None:
        raise ConfigError("--resume", "it takes up the run of a directory", "give its --out")
    config = load_recipe(recipe, settings or ())
    out = out or Path("runs") / f"{recipe.stem}-{datetime.now():%Y%m%d-%H%M%S}"

    from flexperts.cli.display import RunDisplay
    from flexperts.federation.observer import Observers
    from flexperts.federation.run import run_federation
    from flexperts.federation.tracking import Tracking

    with Tracking(track or (), config, out) as tracking, RunDisplay() as display:
        summary = run_federation(config, out, Observers(display, tracking), resume=resume)
    display.result(summary, out)
