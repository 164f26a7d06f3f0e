"""The server's state at rest: one safetensors file, written whole after every round."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flexperts.artifacts import write_bytes
from flexperts.errors import ArtifactError
from flexperts.methods.server import Server
from flexperts.parameters.payload import Payload

_FORMAT = "flexperts-server-1"
_SHARED, _MEMORY = "shared/", "memory/"


def save_server(path: Path, server: Server) -> None:
    """Write the server's whole state, or nothing.

    Raises:
        ArtifactError: It cannot be written; the old file, if there was one, still stands.
    """
    tensors = {f"{_SHARED}{n}": t for n, t in server.shared.tensors().items()}
    tensors |= {f"{_MEMORY}{n}": t for n, t in server.memory.items()}
    rest = {
        "round": server.round,
        "clients": server.clients,
        "reports": server.reports,
        "agreement": server.agreement,
        "seed": server.seed,
    }
    header = {_FORMAT: json.dumps(rest)}
    write_bytes(path, save({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, metadata=header))


def load_server(path: Path, clients: Collection[str] | None = None) -> Server:
    """Read a server's state.

    Args:
        path: The checkpoint.
        clients: Names that the state must have been made with; None takes any.

    Raises:
        ArtifactError: The file is missing, damaged or foreign, or made with other clients.
    """
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {})[_FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        server = Server(Payload.of(_under(_SHARED, tensors)), memory=_under(_MEMORY, tensors), **rest)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}", "there is no checkpoint", "give a run's directory") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}", f"it is damaged ({error!r})", "restore it from a copy or run again"
        ) from error
    if clients is not None and sorted(clients) != sorted(server.clients):
        raise ArtifactError(
            f"{path} is of clients {', '.join(sorted(server.clients))}",
            f"now there are {', '.join(sorted(clients))}",
            "resume with the same clients",
        )
    return server


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
