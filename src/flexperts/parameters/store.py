"""Stored personal state: one safetensors file per client, written completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flexperts.checked_file import read_meta, read_sealed, write_sealed
from flexperts.errors import ArtifactError
from flexperts.files import damaged, move_file

MOMENTS = "moments."
"""Begins the name of each of AdamW's kept moments."""
_FORMAT = "flexperts-personal-2"
_AHEAD = ThreadPoolExecutor(1, "states")
"""Reads states before they are asked for; its thread starts with the first of them."""


@dataclass(frozen=True)
class PersonalMeta:
    """Metadata of a personal state.

    Args:
        client: Name of the state's client.
        base: Fingerprint of the base model.
        round: Last round in which the state was trained; 0 before any.
        shared: Hash of the shared weights with which the state was trained.
        choice: Grafted experts by experts module.
        selection: Relative reconstruction loss of every expert, by experts module.
        scales: Factors of the chosen experts' outputs, by experts module; empty means 1.
        total_steps: Steps of the schedule of which its last round was a part; 0 before any, or if it is not known.
    """

    client: str
    base: str
    round: int
    shared: str
    choice: dict[str, tuple[int, ...]]
    selection: dict[str, list[float]]
    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)
    total_steps: int = 0


def save_personal(path: Path, tensors: Mapping[str, Tensor], meta: PersonalMeta) -> None:
    """Write a personal state completely or not at all."""
    write_sealed(path, _FORMAT, tensors, asdict(meta))


def load_personal(
    path: Path | str, *, base: str | None = None, moments: bool = False
) -> tuple[dict[str, Tensor], PersonalMeta]:
    """Read a personal state.

    Args:
        path: The client's file.
        base: Fingerprint of the base to which the state must belong; None accepts any.
        moments: Whether to return AdamW's kept moments too, which only training needs.

    Raises:
        ArtifactError: The file is missing, damaged, not a personal state, or belongs to another base.
    """
    path = Path(path)
    tensors, value = read_sealed(path, _FORMAT)
    wanted = {name: t for name, t in tensors.items() if moments or not name.startswith(MOMENTS)}
    return wanted, _meta_on(path, value, base)


def check_personal(path: Path, *, base: str) -> None:
    """Do what ``load_personal`` does without reading tensors: a changed byte in one shows when it is loaded."""
    _meta_on(path, read_meta(path, _FORMAT), base)


State = tuple[dict[str, Tensor], PersonalMeta]


class PersonalStore:
    """A client's newest personal state, and the one before it.

    Two states are kept because an interrupted run resumes at the start of the round, in which some clients may
    already have trained.

    Args:
        path: File of the newest state.
        base: Fingerprint of the base to which states must belong.
    """

    def __init__(self, path: Path, base: str) -> None:
        self.path, self.base = path, base
        self.older = path.parent / "before" / path.name
        self._ahead: dict[int, Future[State | None]] = {}

    def read_ahead(self, up_to: int) -> None:
        """Begin with ``load`` in a thread, into pages from which a card fetches directly."""
        self._ahead = {up_to: _AHEAD.submit(self._pinned, up_to)}

    def load(self, up_to: int) -> State | None:
        """Return the newest state of a round not later than ``up_to``, or None if the client has no state yet."""
        begun, self._ahead = self._ahead.get(up_to), {}
        return self._read(up_to) if begun is None else begun.result()

    def _pinned(self, up_to: int) -> State | None:
        if (state := self._read(up_to)) is None:
            return None
        tensors, meta = state
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}, meta

    def _read(self, up_to: int) -> State | None:
        newest: int | None = None
        for path in (self.path, self.older):
            if path.exists():
                state = load_personal(path, base=self.base, moments=True)
                if state[1].round <= up_to:
                    return state
                newest = newest or state[1].round
        if newest is not None:
            raise ArtifactError(
                f"{self.path} is of round {newest}",
                f"the server asks for round {up_to} or before",
                "resume with the run directory that the server used before, or start a new run",
            )
        return None

    def save(self, tensors: Mapping[str, Tensor], meta: PersonalMeta) -> None:
        """Write the state of a round; a state of an earlier round becomes the one before."""
        if self.path.exists() and _meta(self.path, read_meta(self.path, _FORMAT)).round < meta.round:
            move_file(self.path, self.older)
        save_personal(self.path, tensors, meta)


_META = TypeAdapter(PersonalMeta)


def _meta_on(path: Path, value: Any, base: str | None) -> PersonalMeta:
    meta = _meta(path, value)
    if base is not None and meta.base != base:
        raise ArtifactError(
            f"{path} belongs to base {meta.base[:12]}",
            f"this run's base is {base[:12]}",
            "use the base on which the state was trained, or start a new run",
        )
    return meta


def _meta(path: Path, value: Any) -> PersonalMeta:
    try:
        return _META.validate_python(value)
    except ValidationError as error:
        raise damaged(path, f"its metadata is not valid for a client: {error.errors()[0]['loc']}") from error
