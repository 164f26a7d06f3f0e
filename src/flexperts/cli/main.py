"""The `flexperts` command: one file per command, and nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from flexperts import __version__
from flexperts.cli import (
    base,
    compare,
    data,
    evaluate,
    export,
    forget,
    generate,
    inspect,
    join,
    methods,
    plan,
    report,
    run,
    serve,
    silo,
)
from flexperts.errors import FlexpertsError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Personalized federated fine-tuning of Mixture-of-Experts language models.",
)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command("run")(run.command)
app.command("compare")(compare.command)
app.command("report")(report.command)
app.command("plan")(plan.command)
app.command("evaluate")(evaluate.command)
app.command("generate")(generate.command)
app.command("export")(export.command)
app.command("join")(join.command)
app.command("serve")(serve.command)
app.command("inspect")(inspect.command)
app.command("methods")(methods.command)
app.command("forget")(forget.command)
app.add_typer(base.app, name="base")
app.add_typer(data.app, name="data")
app.add_typer(silo.app, name="silo")


def main() -> None:
    """Run the command line; a broken rule is one line on stderr and exit code 2."""
    # Libraries announce their own future to their developers; users of this command cannot act on it.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except FlexpertsError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {_escaped(error)}")
        sys.exit(2)


def _escaped(error: FlexpertsError) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
