"""The ClientApp on a SuperNode: it sends every message to the silo's worker and returns the answer.

Flower starts a process for each message, so this one imports no torch and loads nothing. If there is no answer, the
reply has the ``client``'s name and the reason as ``error``, and the round continues without this silo. Flower would
send the text of an exception, so none leaves here but ``ConfigError``, whose text names no private value.
"""

from __future__ import annotations

import logging
import os
import stat
import tomllib
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Client
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flexperts.communication.wire import deserialize, serialize
from flexperts.config.names import client_name
from flexperts.deployment.state import socket_of
from flexperts.errors import ConfigError, logged

log = logging.getLogger(__name__)
_NO_WORKER = "no worker answers; start `flexperts silo serve`"


def _reply(kind: str, message: Message, context: Context) -> Message:
    name, socket, shared = _door(context)
    try:
        answer = _relayed(kind, message.content, context, name, socket, shared=shared)
    except Exception as error:
        log.error("no answer: %s", logged(error))
        answer = _failed(name, type(error).__name__)
    return Message(answer, reply_to=message)


app = ClientApp()
app.query("join")(partial(_reply, "query.join"))
app.query("initial")(partial(_reply, "query.initial"))
app.query("keys")(partial(_reply, "query.keys"))
app.train()(partial(_reply, "train"))
app.evaluate()(partial(_reply, "evaluate"))


def _relayed(
    kind: str, content: RecordDict, context: Context, name: str, socket: Path, *, shared: bool
) -> RecordDict:
    """Return the worker's answer, or an error record with the reason."""
    told = dict(content.config_records.get("info", ConfigRecord()))
    run = {"run": str(told.get("run", "")), "recipe": str(context.run_config.get("recipe", ""))}
    try:
        fields, answer = deserialize(_exchange(socket, serialize({"kind": kind} | run, content), shared=shared))
    except (OSError, EOFError) as error:
        log.error("%s: %r", socket, error)
        return _no_answer(name, _NO_WORKER)
    return _failed(name, fields["error"]) if "error" in fields else answer


def _exchange(path: Path, request: bytes, *, shared: bool) -> bytes:
    """Send one request and wait for its reply; a socket that some other user may have made is refused.

    A socket for several users must be made by the only user who can write to its folder, others by this user.
    """
    found, folder = path.lstat(), path.parent.stat()
    expected = folder.st_uid if shared and not folder.st_mode & 0o022 else os.getuid()
    if found.st_uid != expected or not stat.S_ISSOCK(found.st_mode):
        raise PermissionError(f"{path} is not a socket of the worker's user")
    with Client(str(path), family="AF_UNIX") as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # the worker does not read a request that is too long
            connection.send_bytes(request)
        return connection.recv_bytes()


def _door(context: Context) -> tuple[str, Path, bool]:
    """Return the silo's name, the worker's socket, and whether that is for several users."""
    try:
        if "socket" in context.node_config:
            return client_name(str(context.node_config["name"])), Path(str(context.node_config["socket"])), True
        name, state = _silo(context)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"this SuperNode's silo ({type(error).__name__})",
            "its --node-config must set silo to the silo's TOML file, which has name and state; or name and socket",
            "run `flexperts silo check` on the silo's file",
        ) from error
    return name, socket_of(state), False


def _silo(context: Context) -> tuple[str, Path]:
    """Return the silo's name and state folder, from the file named in this SuperNode's configuration."""
    path = Path(str(context.node_config["silo"]))
    silo = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    if "socket" in silo:
        raise ConfigError(
            "this SuperNode's silo has a [socket]",
            "the SuperNode of such a silo must not need the silo's file",
            "set name and socket in --node-config instead; see docs/deploy.md",
        )
    return client_name(str(silo["name"])), (path.parent / str(silo["state"])).resolve()


def _failed(name: str, error: str) -> RecordDict:
    return _no_answer(name, f"{error}; see that silo's log")


def _no_answer(name: str, error: str) -> RecordDict:
    return RecordDict({"info": ConfigRecord({"client": name, "error": error})})
