"""`flexperts export`: write a finished run's model as a folder that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexperts.cli.generate import Base, Device, Trust

Client = Annotated[
    str | None,
    typer.Option("--client", help="The model's client; not needed for a model that all share.", show_default=False),
]
Form = Annotated[
    str,
    typer.Option(
        "--form",
        help="transformers: the whole model. merged: the global model. adapter: LoRA for PEFT. personal: the "
        "client's own part.",
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option("--state", help="global or personalized.", show_default="depends on the form"),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Stored weights: bfloat16 or float32.", show_default="the base's"),
]


def command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to create.")],
    client: Client = None,
    form: Form = "transformers",
    state: StateOption = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
    verify: Annotated[bool, typer.Option(help="Load it in a fresh process and compare logits.")] = True,
) -> None:
    """Write a model of a finished run as a folder that transformers or PEFT can load, with a model card."""
    from flexperts.artifacts import RunDirectory

    RunDirectory.open(run).summary()  # refuse a wrong path before anything heavy loads

    from flexperts.reports.cells import size
    from flexperts.terminal.live import showing_stages

    with showing_stages():
        from flexperts.export.exporting import export_run

        done = export_run(
            run,
            to,
            client=client,
            form=form,
            state=state,
            dtype=dtype,
            base=base,
            check=verify,
            trust_remote_code=trust,
        )
    typer.echo(f"{done.folder}: {size(done.bytes).text}, state {done.state}")
    if done.difference:
        why = "; rounding to bfloat16 explains this" if done.difference.is_coarse else ""
        typer.echo(f"{done.difference}{why}")
