"""Personal state at rest: one safetensors file per client, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flexperts.checked_file import read_meta, read_sealed, write_sealed
from flexperts.errors import ArtifactError
from flexperts.files import damaged

_FORMAT = "flexperts-personal-2"


@dataclass(frozen=True)
class PersonalMeta:
    """What a personal state belongs to.

    Args:
        client: Name of the client whose state this is.
        base: Fingerprint of the base model.
        round: Last round that the state was trained in; 0 before any.
        shared: Hash of the shared weights the state was trained with.
        choice: Grafted experts by experts module.
        selection: Relative reconstruction loss of every expert, by experts module.
        scales: Factors on the chosen experts' outputs, by experts module; empty means 1.
    """

    client: str
    base: str
    round: int
    shared: str
    choice: dict[str, tuple[int, ...]]
    selection: dict[str, list[float]]
    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)


def save_personal(path: Path, tensors: Mapping[str, Tensor], meta: PersonalMeta) -> None:
    """Write a personal state whole or not at all."""
    write_sealed(path, _FORMAT, tensors, asdict(meta))


def load_personal(path: Path, *, base: str | None = None) -> tuple[dict[str, Tensor], PersonalMeta]:
    """Read a personal state.

    Args:
        path: The client's file.
        base: Fingerprint that the state must belong to; None takes any.

    Raises:
        ArtifactError: The file is missing, damaged, not a personal state, or of another base.
    """
    tensors, value = read_sealed(path, _FORMAT)
    meta = _meta(path, value)
    if base is not None and meta.base != base:
        raise ArtifactError(
            f"{path} belongs to base {meta.base[:12]}",
            f"this run's base is {base[:12]}",
            "use the base that the state was trained on, or start a new run",
        )
    return tensors, meta


class PersonalStore:
    """A client's personal state from round to round: the newest, and the one before it.

    Two generations, because a run that breaks off within a round is taken up again at the round's start, and some
    clients have trained in it already.

    Args:
        path: Where the newest state lies.
        base: Fingerprint that states must belong to.
    """

    def __init__(self, path: Path, base: str) -> None:
        self.path, self.base = path, base
        self.older = path.parent / "before" / path.name

    def load(self, up_to: int) -> tuple[dict[str, Tensor], PersonalMeta] | None:
        """Return the newest state of a round not later than ``up_to``, or None before a client has any."""
        newest: int | None = None
        for path in (self.path, self.older):
            if path.exists():
                state = load_personal(path, base=self.base)
                if state[1].round <= up_to:
                    return state
                newest = newest or state[1].round
        if newest is not None:
            raise ArtifactError(
                f"{self.path} is of round {newest}",
                f"the server asks for round {up_to} or before",
                "resume with the server's own run directory, or start a new run",
            )
        return None

    def save(self, tensors: Mapping[str, Tensor], meta: PersonalMeta) -> None:
        """Write the state of a round; a state of an earlier round becomes the one before."""
        if self.path.exists() and _meta(self.path, read_meta(self.path, _FORMAT)).round < meta.round:
            try:
                self.older.parent.mkdir(exist_ok=True)
                self.path.replace(self.older)
            except OSError as error:
                raise ArtifactError(
                    f"{self.older}", f"it cannot be written ({error})", "free some space or choose another folder"
                ) from error
        save_personal(self.path, tensors, meta)


_META = TypeAdapter(PersonalMeta)


def _meta(path: Path, value: Any) -> PersonalMeta:
    try:
        return _META.validate_python(value)
    except ValidationError as error:
        raise damaged(path, f"its metadata is not that of a client: {error.errors()[0]['loc']}") from error
