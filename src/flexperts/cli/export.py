"""`flexperts export`: write a finished run's model as a folder that other tools read."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from flexperts.cli.generate import Base, Device, Trust

if TYPE_CHECKING:
    from flexperts.export.exporting import Export

Client = Annotated[
    str | None,
    typer.Option("--client", help="The model's client; not needed for a model that all share.", show_default=False),
]
Form = Annotated[
    str,
    typer.Option(
        "--form",
        help="transformers: the whole model. merged: the global model. adapter: LoRA for PEFT. personal: the "
        "client's own part. gguf: the whole model for llama.cpp and Ollama.",
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option("--state", help="global, personalized; with a floor chosen.", show_default="depends on the form"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Stored weights: bfloat16 or float32; of gguf also float16 or q8_0.",
        show_default="the base's; of gguf float16",
    ),
]


Bake = Annotated[
    bool,
    typer.Option(
        "--bake", help="Turn grafts into neurons of the shared experts: a stock architecture; needs the rows."
    ),
]
MaxLoss = Annotated[
    float, typer.Option(min=0, metavar="NATS", help="Of --bake: most NLL per token that it may lose.")
]
To = Annotated[
    Path | None,
    typer.Option("--to", help="Folder to create.", show_default="none: a folder is only sent"),
]
Push = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Send the folder to this repository on the Hugging Face hub."),
]
Public = Annotated[bool, typer.Option("--public", help="Of --push: everyone may read the repository.")]
Yes = Annotated[bool, typer.Option("--yes", help="Of --push: send without asking.")]


def command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    to: To = None,
    client: Client = None,
    form: Form = "transformers",
    state: StateOption = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
    verify: Annotated[bool, typer.Option(help="Load it in a fresh process and compare logits.")] = True,
    bake: Bake = False,
    max_loss: MaxLoss = 0.05,
    push: Push = None,
    public: Public = False,
    yes: Yes = False,
) -> None:
    """Write a model of a finished run as a folder for other tools, with a model card, or send it to the hub."""
    from flexperts.artifacts import RunDirectory

    RunDirectory.open(run).summary()  # refuse a wrong path before anything heavy loads
    _check_target(to, push, yes=yes)

    from flexperts.export.hub import folder_name
    from flexperts.reports.cells import size
    from flexperts.terminal.live import showing_stages

    with TemporaryDirectory(prefix="flexperts-") as place:
        folder = to or Path(place) / folder_name(str(push))
        with showing_stages():
            from flexperts.export.exporting import export_run

            done = export_run(
                run,
                folder,
                client=client,
                form=form,
                state=state,
                dtype=dtype,
                base=base,
                check=verify,
                trust_remote_code=trust,
                baked=bake,
                max_loss=max_loss,
            )
        typer.echo(f"{to or push}: {size(done.bytes).text}, state {done.state}")
        if done.baking:
            typer.echo(done.baking)
        if done.difference:
            why = f"; rounding to {done.dtype} explains this" if done.difference.is_coarse else ""
            typer.echo(f"{done.difference}{why}")
        if push:
            _send(done, push, private=not public, yes=yes)


def _check_target(to: Path | None, push: str | None, *, yes: bool) -> None:
    """Refuse an export that goes nowhere, and one about which nobody could be asked at its end."""
    from flexperts.errors import ConfigError

    if to is None and push is None:
        raise ConfigError("neither --to nor --push", "an export needs a place", "name a folder with --to")
    if push is not None:
        from flexperts.export.hub import check_name

        check_name(push)
        if not yes and not sys.stdin.isatty():
            rule = "nobody can be asked here whether the model may leave this machine"
            raise ConfigError("--push", rule, "add --yes if it may")


def _send(done: Export, repo_id: str, *, private: bool, yes: bool) -> None:
    """Say what leaves this machine, ask, and send it."""
    from flexperts.export.hub import leaving, push

    for line in leaving(done.folder, repo_id, done.client, private=private):
        typer.echo(line)
    if not yes:
        typer.confirm("send it?", abort=True)
    typer.echo(push(done.folder, repo_id, private=private))
