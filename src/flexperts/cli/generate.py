"""`flexperts generate`: ask one client's model a question."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexperts.environment import DEVICE

if TYPE_CHECKING:
    from flexperts.evaluation.generation import Answer
    from flexperts.export.opened import ExportedFolder

About = Annotated[str, typer.Option("--context", help="Passage that the instruction is about.")]
StateOption = Annotated[
    str | None,
    typer.Option("--state", help="zero_shot, global, personalized or chosen.", show_default="the client's own"),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="Folder of the run's base.", show_default="the recipe's"),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the base's own Python code, if the recipe asks for it too. Only for authors whom you trust.",
    ),
]

_HUB = "hub:"
_EXPORTED = ("config.json", "adapter_config.json")
"""Files that an exported folder has, and a run directory has not."""


def is_exported(place: str) -> bool:
    """Return whether an argument names an exported folder, on this machine or on the hub, and not a run."""
    return place.startswith(_HUB) or any((Path(place) / name).is_file() for name in _EXPORTED)


def open_exported(place: str, base: str | None, *, trust: bool) -> ExportedFolder:
    """Return an exported folder; one on the hub is fetched."""
    from flexperts.export.hub import fetched, folder_name
    from flexperts.export.opened import ExportedFolder

    if not place.startswith(_HUB):
        return ExportedFolder(Path(place), base, None, trust_remote_code=trust)
    repository = place.removeprefix(_HUB)
    folder = ExportedFolder(fetched(repository), base, None, trust_remote_code=trust)
    folder.name = str(folder.about.get("client", folder_name(repository)))
    return folder


def _compute_on(device: str | None) -> None:
    """Let this process, and those it starts, compute on a device."""
    if device is not None:
        os.environ[DEVICE] = device


Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto | cpu | cuda:N",
        envvar=DEVICE,
        callback=_compute_on,
        help="Device of the model.",
        show_default="a card where there is one",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer.", show_default="as in the evaluation"),
]


Messages = Annotated[
    Path | None,
    typer.Option("--messages", metavar="FILE", help="JSON list of the chat's turns before: role and content."),
]


def turns_of(path: Path | None) -> list[dict[str, str]]:
    """Return the turns in a file of ``--messages``."""
    if path is None:
        return []
    from flexperts.data.bad_rows import BadValueError
    from flexperts.data.text_files import decoded_text
    from flexperts.data.turns import read_turns
    from flexperts.errors import ConfigError

    try:
        return [turn.mapping for turn in read_turns(decoded_text(path), str(path))]
    except BadValueError as error:
        raise ConfigError(f"--messages: {error.what}", error.rule, "correct the file") from error


def sets_trust(settings: Iterable[str]) -> bool:
    """Return whether a --set on the command line says that code of the base may run; the last one counts."""
    said = [one.partition("=")[2] for one in settings if one.partition("=")[0].strip() == "model.trust_remote_code"]
    return bool(said) and said[-1].strip() == "true"


def say(answer: Answer) -> None:
    """Print an answer, and a line on stderr if the answer was cut at the limit."""
    typer.echo(answer)
    if answer.cut:
        typer.echo(f"[cut at {answer.tokens} tokens; --max-tokens N allows a longer answer]", err=True)


def command(
    run: Annotated[
        str, typer.Argument(help="Run directory; or an exported folder, or hub:OWNER/NAME for one on the hub.")
    ],
    instruction: Annotated[str, typer.Argument(help="What to ask.")],
    client: Annotated[
        str | None, typer.Option(help="The client whose model answers.", show_default="needed for a run")
    ] = None,
    context: About = "",
    messages: Messages = None,
    text: Annotated[bool, typer.Option("--text", help="Continue the instruction as plain text.")] = False,
    state: StateOption = None,
    max_tokens: MaxTokens = None,
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Print one client's answer to an instruction; on stderr, whether it was cut."""
    before = turns_of(messages)

    from flexperts.artifacts import RunDirectory
    from flexperts.errors import ConfigError

    path, asked = Path(run), dict[str, Any](before=before, plain=text)
    exported = is_exported(run)
    if exported and not (client is None and state is None):
        rule = "an exported folder holds one model, in one state"
        raise ConfigError(f"--client {client}, --state {state}", rule, "leave them out")
    if not exported:
        RunDirectory.open(path).summary()  # refuse a wrong path before anything heavy loads
        if client is None:
            raise ConfigError("no --client", "a run has a model for each client", "name one with --client")

    from flexperts.terminal.live import showing_stages

    with showing_stages() as display:
        if exported:
            from flexperts.finished.trained import prompt_of

            model = open_exported(run, base, trust=trust)
            prompt = prompt_of(model.encoder, instruction, context, **asked)
            display.stage("answering")
            [answer] = model.answers([prompt], max_tokens, None)
        else:
            from flexperts.finished.trained import TrainedRun

            trained = TrainedRun(path, base=base, trust_remote_code=trust)
            display.stage("answering")
            answer = trained.generate(str(client), instruction, context, state, max_new_tokens=max_tokens, **asked)
    say(answer)
