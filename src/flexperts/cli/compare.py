"""`flexperts compare`: methods and variants on one recipe, over several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexperts.cli.generate import Device, Trust, sets_trust
from flexperts.cli.interrupted import command_line, stoppable
from flexperts.cli.report import Samples


def command(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe: a TOML or YAML file, or one that ships: quickstart, large, study-silos.")
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods (all = every other one), and variants that the recipe defines.",
            show_default="the recipe's [compare] entries",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Number of seeds: 0, 1, ...", show_default="the recipe's"),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Entry that the others are compared with.", show_default="the directory's, the recipe's, the first"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory; finished runs in it are not run again.", show_default="runs/<recipe>"),
    ] = None,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of every run. Repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, on one copy of the base.")] = 1,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Keep every run's weights.")] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACKER", help="Log every run; see the same option of `flexperts run`. Repeatable."),
    ] = None,
    samples: Samples = 0,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Run every method with every seed, then write table, HTML report and Markdown; resumable at any point."""
    from flexperts.cli.report import check_plots
    from flexperts.errors import ConfigError
    from flexperts.recipe import check_extras, check_trust, load_recipe

    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    if methods is not None and not names:
        raise ConfigError(
            f"--methods {methods!r}", "it names no method", "give at least one name, or leave the option out"
        )
    check_plots()
    check_extras(load_recipe(recipe, settings))

    from flexperts.studies.entries import plan_comparison

    plan = plan_comparison(recipe, settings, entries=names, seeds=seeds, reference=reference)
    for entry in plan.entries:
        config = plan.config(entry, plan.seeds[0])
        check_trust(config, recipe, trusted=trust or sets_trust(settings))
        check_extras(config)
    out = out or Path("runs") / recipe.stem

    from flexperts.cli.report import report
    from flexperts.terminal.live import ProgressDisplay, showing_stages

    with showing_stages():
        from flexperts.studies.claim import alone_in
        from flexperts.studies.collect import collect_comparison
        from flexperts.studies.runner import Job, jobs, run_comparison

    planned = jobs(plan, out)
    chosen: list[tuple[str, object]] = [("--methods", methods), ("--seeds", seeds), ("--reference", reference)]
    chosen += [("--out", out), ("--set", settings), ("--track", track)]
    chosen += [("--workers", workers if workers > 1 else None), ("--keep-weights", keep_weights)]
    chosen += [("--device", device), ("--trust-remote-code", trust)]
    again = command_line("compare", str(recipe), options=chosen)

    def done() -> int:
        return sum(job.done for job in planned)

    def kept() -> str:
        return f"{done()} of {len(planned)} runs are finished, kept in {out}; resume with {again}"

    with stoppable(kept), ProgressDisplay() as display:
        display.say(f"{len(planned)} runs, {done()} of them finished already; everything is in {out}")

        def tell(job: Job, error: str | None) -> None:
            noted = job.folder / "error.txt"
            where = f" (see {noted})" if noted.exists() else ""
            outcome = f"failed: {error}{where}" if error else "finished"
            display.say(f"[{done()}/{len(planned)}] {job}: {outcome}")

        failed = run_comparison(
            plan,
            out,
            workers=workers,
            keep_weights=keep_weights,
            track=track or (),
            observer=display,
            on_done=tell,
        )
        display.stage("making the report")
        with alone_in(out):
            report(display.console, collect_comparison(out, samples=samples), out)
    if failed:
        raise typer.Exit(1)
