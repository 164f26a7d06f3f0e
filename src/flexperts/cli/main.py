"""The `flexperts` command: one file per command; heavy modules are imported only when a command runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flexperts import __version__
from flexperts.cli import (
    audit,
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
    new,
    plan,
    report,
    run,
    serve,
    server,
    silo,
    status,
)
from flexperts.errors import ArtifactError, ConfigError, FlexpertsError
from flexperts.terminal.console import console, escape_what_cannot_be_shown, take_names_as_utf8

_SHOWN = 80
"""Most characters of an argument that an error message repeats."""

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
    _check_alone()


app.command("new")(new.command)
app.command("run")(run.command)
app.command("compare")(compare.command)
app.command("report")(report.command)
app.command("status")(status.command)
app.command("plan")(plan.command)
app.command("audit")(audit.command)
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
app.add_typer(server.app, name="server")


def main() -> None:
    """Run the command line; a ``FlexpertsError`` is printed as one line on stderr, with exit code 2."""
    # These warnings of libraries are for developers; users of this command cannot act on them.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    take_names_as_utf8()
    escape_what_cannot_be_shown()
    try:
        _check_arguments(sys.argv[1:])
        _check_home()
        with _permitted():
            app()
    except FlexpertsError as error:
        say = console(stderr=True)
        say.print("error:", style="red", end=" ")
        say.print(str(error), soft_wrap=True)
        sys.exit(2)


@contextmanager
def _permitted() -> Iterator[None]:
    """Make an error of a path that this user cannot open, wherever a command has met it."""
    try:
        yield
    except PermissionError as error:
        if error.filename is None:
            raise
        path, rule = os.fsdecode(error.filename), f"this user cannot open it ({error.strerror})"
        remedy = f"change the owner or mode of what `namei -l {path}` lists, or start the command as another user"
        raise ArtifactError(path, rule, remedy) from error


def _check_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are not UTF-8 text: they would get into files, recipes and answers."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            rule, remedy = (
                "it holds bytes that are not UTF-8 text",
                "write it in UTF-8; if it is a file name, rename the file",
            )
            told = ascii(argument[:_SHOWN]).replace("\\udc", "\\x")  # as Python writes bytes
            raise ConfigError(f"argument {told}", rule, remedy) from error


def _check_alone() -> None:
    """Refuse to be one of several processes of one launcher: each would do the whole command."""
    if (count := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(count) > 1:
        rule = "each of these processes would do the whole command, on files that only one may write"
        remedy = "start it without torchrun, or unset WORLD_SIZE; for several cards see docs/large-models.md"
        raise ConfigError(f"WORLD_SIZE = {int(count)}", rule, remedy)


def _check_home() -> None:
    """Refuse a user without a home folder (such as a bare user id in a container): libraries need one on import."""
    try:
        Path.home()
    except RuntimeError as error:
        rule = "this user has none, and libraries keep settings and caches there"
        raise ConfigError("the home folder", rule, "set HOME to a folder that you can write to") from error
