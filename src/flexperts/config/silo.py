"""Settings of one silo: what a client's machine adds to a recipe that it receives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from flexperts.config.data import ClientFiles, Columns, OnBadRow
from flexperts.config.names import client_name
from flexperts.config.section import Section
from flexperts.errors import DataError


def _name(text: str) -> str:
    try:
        return client_name(text)
    except DataError as error:
        raise PydanticCustomError("name", "{rule}", {"rule": error.rule}) from error


class SiloData(ClientFiles):
    """The silo's own rows."""

    columns: Columns = Field(default_factory=dict)
    """Field (instruction, context, response, category) -> column, where the column has another name."""
    on_bad_row: OnBadRow = "refuse"
    """What to do with bad rows: refuse = stop and name all of them; drop = leave them out and say which."""


class SiloSocket(Section):
    """A socket for a SuperNode that runs as another user; without it, the socket is in the state folder."""

    path: str
    """The socket, alone in its folder; the worker makes the folder, or checks that no one else can write to it."""
    group: Annotated[str, Field(min_length=1)]
    """Group that owns the socket; its members can open it."""
    users: Annotated[list[str], Field(min_length=1)]
    """Users (names or numbers) whose processes get answers; all others are refused, members of the group too."""


class SiloConfig(Section):
    """One silo. Only the name is ever sent."""

    name: Annotated[str, AfterValidator(_name)]
    """The client's name in every run: letters of one script, digits, "-", "_", "."; it begins with no "."."""
    state: str
    """Folder of the private state of every run; only its owner may enter it."""
    base: str
    """The recipe's base on this machine: a shipped base's name, a local transformers folder, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of the base at start; a recipe with the other type makes the silo load the base again."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How its routed experts are stored at start; a recipe that differs makes the silo load the base again."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ..."""
    trust_remote_code: bool = False
    """Let the base's own Python code run; no recipe can switch it on."""
    data: SiloData
    socket: SiloSocket | None = None
    """Socket for a SuperNode that runs as another user; see docs/deploy.md."""
