"""`flexperts silo`: serve a silo, check its rows, and manage the state that it keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexperts.cli.generate import About, MaxTokens, Messages, StateOption, say, turns_of
from flexperts.observer import Observer

if TYPE_CHECKING:
    from flexperts.config.run import RunConfig
    from flexperts.config.silo import SiloConfig

app = typer.Typer(no_args_is_help=True, help="Serve a silo: its rows, its base and its personal models stay there.")

_Silo = Annotated[Path, typer.Argument(metavar="SILO.toml", help="The silo's file; see docs/deploy.md.")]


@app.callback()
def _group() -> None:
    """Serve a silo: its rows, its base and its personal models stay there."""


@app.command("serve")
def serve(silo: _Silo) -> None:
    """Keep the silo's base in memory and answer its SuperNode, until stopped with Ctrl-C or SIGTERM."""
    import logging
    import os
    import signal
    import sys

    from flexperts.recipe import check_silo_extras, load_silo

    settings = load_silo(silo)
    check_silo_extras(settings)
    os.umask(0o077)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))

    from flexperts.deployment import listening
    from flexperts.terminal.console import console
    from flexperts.terminal.display import RunDisplay

    with (
        RunDisplay(console(stderr=True), stages_last=False) as display,
        listening.listening(Path(settings.state), settings.socket) as door,
    ):
        from flexperts.deployment.worker import Worker

        handler = logging.StreamHandler()  # made inside the display, so that rich keeps its bar below these lines
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("flexperts").addHandler(handler)
        worker = Worker(settings, display)
        display.stage(f"{settings.name}: serving {settings.state}")
        most, called = settings.policy.max_message_bytes, worker.requests.called
        listening.serve_requests(door, worker.reply, most, settings.socket, called)


@app.command("check")
def check(
    silo: _Silo,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of the planned run.", show_default="default settings"),
    ] = None,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Also connect to this SuperLink, and compare clocks.")
    ] = None,
    root_certificates: Annotated[Path, typer.Option(help="With --superlink: the CA's file.")] = Path("ca.crt"),
) -> None:
    """Read and encode the silo's rows as a run does, without the base's weights, and report all errors."""
    from flexperts.cli.checking import caught, checked, print_report, raise_last
    from flexperts.config.data import DataConfig
    from flexperts.config.run import RunConfig
    from flexperts.deployment.settings import for_silo
    from flexperts.recipe import check_silo_extras, load_recipe, load_silo

    settings = load_silo(silo)
    planned = load_recipe(recipe) if recipe else RunConfig(data=DataConfig(at_silos=True))
    found = checked(for_silo(planned, settings), whole=False)
    print_report(found, "silo", str(silo), as_json=False, example=False)
    wrong = found.errors
    wrong += caught(check_silo_extras, settings)
    wrong += caught(_show_policy, settings, planned if recipe else None)
    wrong += caught(_show_state, settings)
    wrong += caught(_show_identity, settings)
    if superlink is not None:
        wrong += caught(_show_superlink, superlink, root_certificates)
    raise_last(wrong)


class Notes(Observer):
    """Observer that prints notices."""

    def notice(self, text: str) -> None:
        """Print a line."""
        typer.echo(f"note: {text}")


def _show_policy(settings: SiloConfig, config: RunConfig | None) -> None:
    """Print the silo's rules, and test the recipe of the planned run against them."""
    from flexperts.deployment.policy import check_policy, check_recipe, rules
    from flexperts.methods.registry import make_method

    check_policy(settings.policy)
    told = rules(settings.policy)
    for rule in told.values():
        typer.echo(f"policy: {rule}")
    open_ = [key for key in type(settings.policy).model_fields if key not in told and key != "delta"]
    typer.echo(f"policy: not set: {', '.join(open_)}")
    if config is not None:
        check_recipe(settings.policy, config, make_method(config.method))


def _show_state(settings: SiloConfig) -> None:
    from flexperts.deployment.callers import check_names
    from flexperts.deployment.listening import is_served
    from flexperts.deployment.state import check_private

    state = Path(settings.state)
    check_private(state)
    served = state.exists() and is_served(state)
    typer.echo(f"{state}: {'private' if state.exists() else 'will be created'}")
    if door := settings.socket:
        check_names(door)
        typer.echo(f"{door.path}: answers {', '.join(door.users)}, by group {door.group}")
    typer.echo("a worker serves it" if served else "no worker serves it now")


def _show_identity(settings: SiloConfig) -> None:
    """Print the identity under which other silos know this one in secure aggregation."""
    from flexperts.client.masking import identity_of
    from flexperts.communication.secure.ciphers import identity_key
    from flexperts.communication.secure.masks import fingerprint
    from flexperts.deployment.state import identity_file

    state = Path(settings.state)
    if not state.exists():
        typer.echo("identity for secure aggregation: made when this silo is first served")
        return
    identity = identity_key(identity_of(identity_file(state))).hex()
    typer.echo(f"identity for secure aggregation: {identity}, for comparing by phone: {fingerprint(identity)}")


def _show_superlink(superlink: str, certificates: Path) -> None:
    from flexperts.deployment.superlink_check import check_superlink

    typer.echo(check_superlink(superlink, certificates))


@app.command("units")
def units(
    silo: _Silo,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperNode finds its SuperLink.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
) -> None:
    """Write a sandbox for the SuperNode, and systemd units for it, the worker, and serving the silo's models."""
    from flexperts.deployment.units import write_units
    from flexperts.observer import observing
    from flexperts.recipe import load_silo

    with observing(Notes()):
        for path in write_units(silo, load_silo(silo), superlink, out):
            typer.echo(f"{path}")


@app.command("runs")
def runs(silo: _Silo) -> None:
    """List the runs whose private state is kept at the silo, and the epsilon that updates have spent."""
    from rich.table import Table

    from flexperts.deployment.kept import kept_runs
    from flexperts.deployment.ledger import Ledger
    from flexperts.recipe import load_silo
    from flexperts.reports.cells import size
    from flexperts.terminal.console import console

    settings = load_silo(silo)
    ledger, table = Ledger(Path(settings.state), settings.policy), Table()
    for column in ("run", "method", "last round", "size", "epsilon"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("run", "method") else "right")
    for kept in kept_runs(Path(settings.state), settings.name, ledger):
        spent = "not counted" if kept.epsilon is None else _epsilon(kept.epsilon)
        table.add_row(kept.run, kept.method, str(kept.round), size(kept.bytes).text, spent)
    console().print(table)
    budget = settings.policy.max_epsilon
    allowed = "no budget" if budget is None else f"policy.max_epsilon = {budget:g}"
    total = _epsilon(ledger.epsilon(*ledger.runs.values()))
    typer.echo(f"epsilon of all runs: {total} at delta {settings.policy.delta:g}; {allowed}")


def _epsilon(spent: float) -> str:
    return f"{spent:.4g}" if math.isfinite(spent) else "unbounded"


@app.command("generate")
def generate(
    silo: _Silo,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `silo runs` shows it.")],
    instruction: Annotated[str, typer.Argument(help="What to ask.")],
    context: About = "",
    messages: Messages = None,
    state: StateOption = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Print the answer of the silo's personal model; nothing leaves this machine."""
    from flexperts.recipe import load_silo

    settings, before = load_silo(silo), turns_of(messages)

    from flexperts.terminal.live import showing_stages

    with showing_stages() as display:
        from flexperts.deployment.home import HomeModel

        model = HomeModel(settings, run)
        display.stage("answering")
        answer = model.generate(instruction, context, state, max_new_tokens=max_tokens, before=before)
    say(answer)


@app.command("forget")
def forget(
    silo: _Silo,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `silo runs` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete the private state of one run, its personal model included."""
    from flexperts.deployment.state import delete_run, private_folder
    from flexperts.recipe import load_silo

    state = Path(load_silo(silo).state)
    folder = private_folder(state, run)
    if yes or typer.confirm(f"Delete {folder} and the personal model in it?", abort=True):
        delete_run(state, run)
        typer.echo(f"{run}: forgotten")
