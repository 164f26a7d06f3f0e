"""The server's state on disk: one safetensors file, written atomically after every round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from flexperts.checked_file import read_meta, read_sealed, write_sealed
from flexperts.communication.compression import Packed
from flexperts.communication.versions import Versions
from flexperts.errors import ArtifactError
from flexperts.files import damaged
from flexperts.methods.kit.server_state import Flight, Server
from flexperts.parameters.vector import Payload

_FORMAT = "flexperts-server-2"
_SHARED, _MEMORY, _DIFFERENCES, _RESIDUAL, _SENT = "shared/", "memory/", "differences/", "residual", "sent/"


class _Versions(BaseModel):
    """The values of ``Versions`` that are not tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    digests: list[str]
    first: int
    held: dict[str, int]
    about: list[dict[str, str | int]]


class _Rest(BaseModel):
    """The values of a checkpoint that are not tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    round: int
    clients: dict[str, int]
    reports: dict[str, Any]
    agreement: Any
    seed: int
    base: str = ""
    start: str = ""
    nodes: dict[str, int] = {}
    versions: _Versions | None = None
    flights: dict[str, dict[str, int | float]] = {}
    clock: float = 0.0
    silos: dict[str, int] = {}


def save_server(path: Path, server: Server) -> None:
    """Write the server's whole state, atomically."""
    tensors = {f"{_SHARED}{n}": t for n, t in server.shared.tensors().items()}
    tensors |= {f"{_MEMORY}{n}": t for n, t in server.memory.items()}
    tensors |= {f"{_SENT}{number}": torch.from_numpy(its.vector) for number, its in server.sent.items()}
    rest = {name: getattr(server, name) for name in _Rest.model_fields if name != "versions"}
    rest["flights"] = {name: vars(flight) for name, flight in server.flights.items()}
    if (versions := server.versions) is not None:
        about = [dict(packed.about) for packed in versions.differences]
        plain = {"digests": versions.digests, "first": versions.first, "held": versions.held}
        rest["versions"] = plain | {"about": about}
        tensors[_RESIDUAL] = torch.from_numpy(versions.residual)
        for number, packed in enumerate(versions.differences):
            tensors |= {f"{_DIFFERENCES}{number}/{n}": torch.from_numpy(a) for n, a in packed.arrays.items()}
    write_sealed(path, _FORMAT, {n: t.detach().clone() for n, t in tensors.items()}, rest)


def load_server(path: Path, clients: Collection[str] | None = None) -> Server:
    """Read a server's state.

    Args:
        path: The checkpoint.
        clients: Client names that the state must have; None accepts any.
    """
    tensors, value = read_sealed(path, _FORMAT)
    try:
        rest = dict(_Rest.model_validate(value))
        rest["versions"] = _versions(rest["versions"], tensors)
    except ValidationError as error:
        raise damaged(path, f"its metadata is not a server's: {error.errors()[0]['loc']}") from error
    except KeyError as error:
        raise damaged(path, f"it has no tensor {error}") from error
    shared = Payload.of(_under(_SHARED, tensors))
    rest["flights"] = {name: Flight(**its) for name, its in rest["flights"].items()}
    server = Server(shared, memory=_under(_MEMORY, tensors), **rest)
    server.sent = {int(n): Payload(shared.manifest, t.numpy()) for n, t in _under(_SENT, tensors).items()}
    if clients is not None and sorted(clients) != sorted(server.clients):
        raise ArtifactError(
            f"{path} has the clients {', '.join(sorted(server.clients))}",
            f"the run now has {', '.join(sorted(clients))}",
            "resume with the same clients",
        )
    return server


def saved_round(path: Path) -> int:
    """Return the number of finished rounds in a checkpoint; 0 if there is no file. Tensors are not read."""
    if not path.exists():
        return 0
    try:
        return int(read_meta(path, _FORMAT)["round"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its metadata is not a server's: {error!r}") from error


def _versions(rest: _Versions | None, tensors: Mapping[str, Tensor]) -> Versions | None:
    if rest is None:
        return None
    differences = [
        Packed({n: t.numpy() for n, t in _under(f"{_DIFFERENCES}{number}/", tensors).items()}, about)
        for number, about in enumerate(rest.about)
    ]
    return Versions(rest.digests, rest.first, differences, rest.held, tensors[_RESIDUAL].numpy())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
