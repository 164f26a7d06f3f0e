"""`flexperts audit`: attack the updates of a run or recipe, and report what they reveal."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flexperts.cli.generate import Base, Device, Trust, sets_trust
from flexperts.cli.interrupted import stoppable


def command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN | RECIPE", help="Run directory of a finished run, or a recipe.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting, such as privacy.clip=10; for a run, training.* and privacy.*. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the result; settings that are in it already are not repeated.",
            show_default="RUN/audit, or runs/audit-<recipe>-<time>",
        ),
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="The client whose update is attacked.", show_default="the first")
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma-separated settings to measure.", show_default="all")
    ] = "",
    silos: Annotated[
        str, typer.Option(metavar="N,N", help="Numbers of silos to measure under secure aggregation.")
    ] = "4,20",
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Attack a client's update in simulated rounds: a lower bound of what updates reveal about its rows."""
    from flexperts.errors import ConfigError
    from flexperts.recipe import check_trust, load_recipe

    counts = tuple(int(n) if n.isascii() and n.isdigit() else 0 for n in map(str.strip, silos.split(",")) if n)
    if not counts or min(counts) < 3:
        rule = "they are whole numbers from 3, below which a sum hides no silo"
        raise ConfigError(f"--silos {silos!r}", rule, "write them as 4,20")
    names = tuple(name for name in map(str.strip, only.split(",")) if name)
    is_run = source.is_dir()
    if not is_run and base is not None:
        raise ConfigError("--base", "a recipe names its base itself", "use --set model.base=PATH")
    config = None if is_run else load_recipe(source, settings or ())
    if config is not None:
        check_trust(config, source, trusted=trust or sets_trust(settings or ()))
    else:
        from flexperts.artifacts import RunDirectory

        RunDirectory.open(source).summary()  # refuse a wrong path before anything heavy loads
    out = out or (
        source / "audit" if is_run else Path("runs") / f"audit-{source.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    )

    from flexperts.terminal.display import RunDisplay
    from flexperts.terminal.preflight import check_memory

    if config is not None:
        config = check_memory(config)
    with stoppable(lambda: f"finished settings are in {out}; the same command with --out {out} adds the others"):
        with RunDisplay() as display:
            from flexperts.audit.audit import Plan, audit_recipe, audit_run

            plan = Plan(client, names, counts)
            if config is not None:
                result = audit_recipe(config, out, plan, display)
            else:
                how: Any = {"base": base, "trust_remote_code": trust}
                result = audit_run(source, settings or (), out, plan, display, **how)
        _show(result, out)


def _show(result: dict[str, Any], out: Path) -> None:
    """Write the pages and print what they say."""
    from flexperts.reports.audit import sentences, write_audit
    from flexperts.terminal.console import console

    write_audit(result, out)
    shown = console()
    for sentence in sentences(result):
        shown.print(f"- {sentence}", soft_wrap=True)
    shown.print(f"everything is in {out}: audit.html to look at, audit.md, audit.json", soft_wrap=True)
