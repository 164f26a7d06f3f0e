"""`flexperts run`: run a recipe and write a run directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexperts.cli.generate import Device, Trust, sets_trust
from flexperts.cli.interrupted import command_line, standing, stoppable
from flexperts.cli.status import Host, Port, page, page_address
from flexperts.progress import RunProgress

if TYPE_CHECKING:
    from flexperts.config.run import RunConfig
    from flexperts.observer import Observer


LOCAL = ("in-process", "ray")
"""Values of ``--engine`` with which this command serves the run itself."""
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N | auto",
        help="Processes in which clients take their turns side by side, on one copy of the base; auto starts as "
        "many as there are cores or cards, and clients for them.",
        show_default="1, or what the recipe says",
    ),
]


def command(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe: a TOML or YAML file, or one that ships: quickstart, large, study-silos.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, such as training.lr=1e-3. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory to create.", show_default="runs/<recipe>-<time>"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="in-process | ray | superlink://NAME",
            help="Where the silos are: on this machine, in actors of Ray, or connected to the SuperLink that "
            "Flower's config.toml calls NAME; --out is then a name in the SuperLink's FLEXPERTS_RUNS. See "
            "docs/deploy.md.",
            show_default="the recipe's engine.kind",
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run a region: the silos of this SuperLink together are the client NAME of another run. See "
            "docs/scale.md.",
        ),
    ] = None,
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRACKER",
            help="Log every round with tensorboard (files in the run directory), or with wandb, mlflow, comet_ml, "
            "trackio, swanlab, aim if it is installed. A tracker may send what it gets to a server: the recipe, "
            "clients' names, losses, scores, sizes and times, never texts, weights or tensors. A tracker's own "
            "settings decide what else it collects, such as terminal output. Repeatable.",
        ),
    ] = None,
    device: Device = None,
    trust: Trust = False,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a page that follows the run, until it ends.")] = False,
    host: Host = None,
    port: Port = None,
) -> None:
    """Run a recipe: train, average, evaluate, and write a run directory."""
    from flexperts.artifacts import RunDirectory
    from flexperts.errors import ConfigError
    from flexperts.recipe import check_extras, check_trust, load_recipe

    if resume and out is None:
        raise ConfigError("--resume", "it needs the directory of the run to resume", "add --out DIRECTORY")
    at = page_address(ui, host, port)
    given = [f"engine.workers={workers}"] if workers is not None else []
    given += [f"engine.kind={engine}"] if engine in LOCAL else []
    config = load_recipe(recipe, [*(settings or ()), *given])
    name = f"{recipe.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    address = None if engine in LOCAL else engine  # without the option, the recipe decides, and the run is local
    out = out or (Path(name) if address is not None else Path("runs") / name)
    options: list[tuple[str, object]] = [("--set", settings), ("--track", track), ("--out", out)]
    options += [
        ("--workers", workers),
        ("--engine", engine),
        ("--region", region),
        ("--device", device),
        ("--trust-remote-code", trust),
        ("--ui", ui),
        ("--host", host),
        ("--port", port),
        ("--resume", True),
    ]
    if region is not None and address is None:
        raise ConfigError(
            f"--region {region}", "a region has a SuperLink of its own", "add --engine superlink://NAME"
        )
    again = command_line("run", str(recipe), options=options)
    if address is not None and at is not None:
        rule = "the run's directory is on its server"
        raise ConfigError("--ui", rule, f"leave it out, and enter `flexperts status {out} --ui` there")
    if address is not None:
        _deploy(config, address, str(out), resume, track, again, region or "")
    else:
        check_trust(config, recipe, trusted=trust or sets_trust(settings or ()))
        check_extras(config)
        with stoppable(lambda: standing(out, again)), _offering(out, again):
            if not resume:
                RunDirectory.check_free(out, config.to_toml(), again)
            if at is None:
                _run(config, out, resume, track or ())
            else:
                progress, later = RunProgress(), command_line("status", str(out), options=[("--ui", True)])
                with page(out, at, f"until it ends (later: {later})", progress.lines):
                    _run(config, out, resume, track or (), progress)


def _run(config: RunConfig, out: Path, resume: bool, track: Sequence[str], *observers: Observer) -> None:
    """Run in this process, and show it."""
    from flexperts.terminal.preflight import check_memory

    config = check_memory(config)

    from flexperts.observer import Observers
    from flexperts.terminal.display import RunDisplay
    from flexperts.tracking import Tracking

    with RunDisplay() as display:
        from flexperts.engines.run import run_federation  # seconds

        with Tracking(track, config, out) as tracking:
            summary = run_federation(config, out, Observers(display, tracking, *observers), resume=resume)
    display.result(summary, out)


@contextmanager
def _offering(out: Path, again: str) -> Iterator[None]:
    """Add what is kept, and how to resume, to the error of a run that made progress in the block."""
    from flexperts.errors import FlexpertsError

    before = _progress(out)
    try:
        yield
    except FlexpertsError as error:
        if _progress(out) == before:
            raise
        remedy = f"{error.remedy}; {standing(out, again)}"
        raise type(error)(error.value, error.rule, remedy) from error


def _progress(out: Path) -> tuple[int, ...]:
    """Return numbers that change when a run makes progress."""
    from flexperts.artifacts import RunDirectory

    run = RunDirectory(out)
    return tuple(
        number
        for one in (run, RunDirectory(run.reference))
        for number in (one.written_rounds(), int((one.path / "config.toml").exists()))
    )


def _deploy(
    config: RunConfig, engine: str, name: str, resume: bool, track: list[str] | None, again: str, region: str
) -> None:
    """Submit the run to a SuperLink, follow its log, and show the result if it is on this machine."""
    from flexperts.artifacts import RunDirectory
    from flexperts.config.names import client_name
    from flexperts.deployment.settings import at_silos, run_folder
    from flexperts.deployment.submit import connection_of, follow, submit
    from flexperts.errors import ConfigError, FederationError
    from flexperts.server.region import check_region
    from flexperts.terminal.display import RunDisplay

    connection, folder = connection_of(engine), run_folder(name)
    if track:
        raise ConfigError(f"--track {track[0]}", "trackers only log runs in this process", "leave --track out")
    if config.method.reference:
        typer.echo(f"reference method {config.method.reference} is left out: a deployed run has one method")
    if region:
        client_name(region)
        check_region(config)
    run_id = submit(at_silos(config).to_toml(), name, connection, resume=resume, region=region)
    typer.echo(f"run {run_id} on {connection}; Ctrl-C does not stop it, `flwr stop {run_id} {connection}` does")
    with stoppable(
        lambda: (
            f"this command only; run {run_id} continues. `flwr log {run_id} {connection}` shows it; after "
            f"`flwr stop`, resume with {again}"
        )
    ):
        status = follow(run_id, connection)
    if status != "finished:completed":
        raise FederationError(
            f"run {run_id} is {status}",
            "it did not complete",
            f"fix what the `error:` line of its log says, then resume with {again}",
        )
    if os.access(folder / "summary.json", os.R_OK):  # not where another user runs the SuperLink
        RunDisplay().result(RunDirectory.open(folder).summary(), folder)
