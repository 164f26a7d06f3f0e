"""`flexperts serve`: a finished run's models, or an exported one, over HTTP, with a chat page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexperts.cli.generate import Base, Device, Trust, is_exported, open_exported
from flexperts.errors import optional
from flexperts.serving.http.settings import Address, Limits

if TYPE_CHECKING:
    from flexperts.config.run import RunConfig
    from flexperts.serving.contract import Engine
    from flexperts.serving.http.keys import KeyRing

_Silo = Annotated[
    Path | None,
    typer.Option(
        metavar="SILO.toml", help="Serve this silo's personal model of a deployed run, on its own machine."
    ),
]
_Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys", metavar="FILE", help="Hashes of API keys by client; without it, only this machine can call."
    ),
]
_Made = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Make a key for each client without one in this file, print the keys once, and exit."
    ),
]
_Prompt = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt in tokens.", show_default="limited by the model's context"),
]
_PromptBytes = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt in bytes.", show_default="16 for each token that a prompt may have"),
]
_Certificate = Annotated[Path | None, typer.Option(metavar="PEM", help="Serve HTTPS with this certificate.")]
_MostClients = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most clients whose models are in memory; those not asked for longest leave.",
        show_default="as many as fit",
    ),
]
_PrivateKey = Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's private key.")]


def command(
    run: Annotated[
        str,
        typer.Argument(
            help="Run directory; with --silo, the id of a run that the silo keeps; or an exported folder, or "
            "hub:OWNER/NAME for one on the hub."
        ),
    ],
    silo: _Silo = None,
    base: Base = None,
    device: Device = None,
    trust: Trust = False,
    keys: _Keys = None,
    make_keys: _Made = None,
    host: Annotated[str, typer.Option(help="Address or name to listen on.")] = Address.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = Address.port,
    tls_cert: _Certificate = None,
    tls_key: _PrivateKey = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Most requests in one batch.")] = 16,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Most tokens in one batch, prompts included.")] = 16_384,
    max_clients: _MostClients = None,
    preflight: Annotated[
        bool, typer.Option(help="Refuse to start if the estimated memory of a large base is not free.")
    ] = True,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests that wait for a batch.")] = Limits.queue,
    per_client: Annotated[
        int, typer.Option(min=1, help="Most requests of one client at a time.")
    ] = Limits.per_client,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = Limits.answer_tokens,
    max_prompt: _Prompt = None,
    max_prompt_bytes: _PromptBytes = None,
    max_connections: Annotated[
        int, typer.Option(min=128, help="Most connections of callers who have not shown a key.")
    ] = Limits.connections,
    max_body: Annotated[int, typer.Option(min=1024, help="Longest request in bytes.")] = Limits.body_bytes,
    timeout: Annotated[float, typer.Option(min=1, help="Most seconds for one answer.")] = Limits.seconds,
    grace: Annotated[int, typer.Option(min=0, help="Seconds to finish open requests when stopped.")] = 30,
) -> None:
    """Serve all models of a run from one resident base, or an exported model: OpenAI's API, and a chat page."""
    from flexperts.serving.http import keys as keys_of

    if silo:
        clients, recipe, load = _at_silo(silo, run, base)
    else:
        clients, recipe, load = (_of_exported if is_exported(run) else _of_run)(run, base, trust)
    if make_keys:
        _print_keys(make_keys, keys_of.make_keys(make_keys, clients))
        return

    address = Address(host, port, tls_cert, tls_key)
    ring, key = _keys(keys, address, clients)
    limits = Limits(
        max_queue, per_client, max_tokens, max_prompt, max_body, timeout, max_prompt_bytes, max_connections
    )
    if preflight and recipe is not None:
        from flexperts.terminal.preflight import clients_in_memory

        max_clients = clients_in_memory(recipe(), clients, max_clients, max_rows=max_rows, max_tokens=batch_tokens)
    _end_on_signals()
    sizes = {"max_rows": max_rows, "max_tokens": batch_tokens, "max_clients": max_clients}
    _serve(lambda: load(**sizes), ring, key, address, limits, grace)


_Opened = tuple[Collection[str], Callable[[], "RunConfig"] | None, Callable[..., "Engine"]]
"""Names of clients, a function that reads their run's recipe if they have one, and one that loads their models."""


def _of_exported(place: str, base: str | None, trust: bool) -> _Opened:
    """Open an exported folder."""
    folder = open_exported(place, base, trust=trust)

    def load(*, max_clients: int | None, **sizes: Any) -> Engine:
        from flexperts.export.served import ExportedModel
        from flexperts.serving.engine.engine import ServingEngine

        return ServingEngine(ExportedModel(folder), **sizes)

    return {folder.name}, None, load


def _of_run(run: str, base: str | None, trust: bool) -> _Opened:
    """Open a run."""
    from flexperts.artifacts import RunDirectory

    path = Path(run)
    directory = RunDirectory.open(path)

    def recipe() -> RunConfig:
        from flexperts.finished.trained import recipe_of

        return recipe_of(directory, base, trusted=trust)

    def load(**sizes: Any) -> Engine:
        from flexperts.serving.engine.engine import open_engine

        return open_engine(path, base=base, trust_remote_code=trust, **sizes)

    return directory.clients, recipe, load


def _at_silo(path: Path, run: str, base: str | None) -> _Opened:
    """Open a silo's models of a run."""
    from flexperts.errors import ConfigError
    from flexperts.recipe import load_silo

    silo = load_silo(path)
    if base is not None:
        raise ConfigError(f"--base {base}", "a silo's base is named in its file", f"change base in {path}")

    def recipe() -> RunConfig:
        from flexperts.artifacts import RunDirectory
        from flexperts.deployment.settings import for_silo
        from flexperts.deployment.state import private_folder
        from flexperts.recipe import recorded_recipe

        folder = RunDirectory.open(private_folder(Path(silo.state), run)).path
        return for_silo(recorded_recipe(folder), silo)

    def load(**sizes: Any) -> Engine:
        from flexperts.deployment.home import HomeRun
        from flexperts.serving.engine.engine import ServingEngine

        return ServingEngine(HomeRun(silo, run), **sizes)

    return {silo.name}, recipe, load


def _print_keys(path: Path, made: Mapping[str, str]) -> None:
    for owner, key in made.items():
        typer.echo(f"{owner}\t{key}")
    new = f"{path} holds the hashes of {len(made)} new keys; the keys are not shown again"
    typer.echo(new if made else f"{path}: every client has a key already", err=True)


def _keys(path: Path | None, address: Address, clients: Collection[str]) -> tuple[KeyRing, str | None]:
    """Return the callers' keys; without a file, one new key for everything, valid until this process ends."""
    from flexperts.errors import ConfigError
    from flexperts.serving.http.keys import OPERATOR, KeyRing, hash_of, load_keys, new_key

    if path:
        return load_keys(path, clients), None
    if not address.is_loopback:
        rule = "other machines can reach this address, so callers need keys"
        raise ConfigError(f"--host {address.host}", rule, "make keys with --make-keys FILE and add --keys FILE")
    key = new_key()
    return KeyRing({OPERATOR: [hash_of(key)]}), key


def _serve(
    open_engine: Callable[[], Engine], ring: KeyRing, key: str | None, address: Address, limits: Limits, grace: int
) -> None:
    """Listen at once, answer when the base is loaded, and serve until stopped or until the engine fails."""
    from flexperts.terminal.live import showing_stages

    with optional("serve", "serving"):
        from flexperts.serving.http.server import make_server, running
        from flexperts.serving.http.service import Service

    service = Service(ring, limits)
    server = make_server(service, address)
    _log_to_stderr()
    with address.listen(limits.connections) as door, running(server, service, door, grace):
        typer.echo("loading", err=True)
        with showing_stages():
            engine = open_engine()
        service.ready(engine)
        _say_ready(engine, address, address.url(door), key)
        _wait(engine)


def _say_ready(engine: Engine, address: Address, url: str, key: str | None) -> None:
    from rich.table import Table

    from flexperts.terminal.console import console

    table = Table()
    for column in ("client", "ask it as"):
        table.add_column(column, overflow="fold")
    for client in dict.fromkeys(model.client for model in engine.models):
        table.add_row(client, ", ".join(str(model) for model in engine.models if model.client == client))
    console(stderr=True).print(table)
    if not address.is_loopback and not address.certificate:
        typer.echo("keys and prompts are sent unencrypted: add --tls-cert, or use a TLS proxy", err=True)
    typer.echo(f"{url}/v1 is the API, {url}/ the page; Ctrl-C stops both", err=True)
    if key:
        typer.echo(f"key until then: {key}\nopen {url}/#key={key}", err=True)


def _wait(engine: Engine) -> None:
    """Wait until the engine fails; raise its failure."""
    import time

    while engine.failure is None:
        time.sleep(1)
    raise engine.failure


def _end_on_signals() -> None:
    """End the process on SIGINT and SIGTERM with cleanup and exit code 0."""
    import signal
    import sys

    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: sys.exit(0))


def _log_to_stderr() -> None:
    """Log one line per chat request, and errors, to stderr; keys and texts are never logged."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("flexperts", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)
