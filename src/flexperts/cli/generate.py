"""`flexperts generate`: ask one client's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

About = Annotated[str, typer.Option("--context", help="Passage that the question is about.")]
State = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time
    typer.Option("--state", help="zero_shot, global or personalized.", show_default="the most personal one"),
]
Base = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--base", metavar="PATH", help="Where the run's base lies.", show_default="where its recipe says"),
]


def command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    instruction: Annotated[str, typer.Argument(help="What to ask.")],
    client: Annotated[str, typer.Option(help="Whose model answers.")],
    context: About = "",
    state: State = None,
    base: Base = None,
) -> None:
    """Print one client's answer to an instruction."""
    from flexperts.artifacts import RunDirectory

    RunDirectory.open(run).summary()  # say what is wrong with the path before anything heavy loads

    from flexperts.federation.trained import TrainedRun

    typer.echo(TrainedRun(run, base=base).generate(client, instruction, context, state))
