"""Personal state at rest: one safetensors file per client, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flexperts.artifacts import write_bytes
from flexperts.errors import ArtifactError

_FORMAT = "flexperts-personal-1"


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
    """Write a personal state whole or not at all.

    Raises:
        ArtifactError: It cannot be written; the old state, if there was one, still stands.
    """
    contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    # One key only: safetensors writes several in random order, and equal states must be equal files.
    write_bytes(path, save(contiguous, metadata={_FORMAT: json.dumps(asdict(meta))}))


def load_personal(path: Path, *, base: str | None = None) -> tuple[dict[str, Tensor], PersonalMeta]:
    """Read a personal state.

    Args:
        path: The client's file.
        base: Fingerprint that the state must belong to; None takes any.

    Raises:
        ArtifactError: The file is missing, damaged, not a personal state, or of another base.
    """
    tensors, meta = _read(path)
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
        """Return the newest state of a round not later than ``up_to``, or None before a client has any.

        Raises:
            ArtifactError: A file is damaged or foreign, or all states are of later rounds.
        """
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
        if self.path.exists() and _read(self.path, meta_only=True)[1].round < meta.round:
            self.older.parent.mkdir(exist_ok=True)
            self.path.replace(self.older)
        save_personal(self.path, tensors, meta)


def _read(path: Path, *, meta_only: bool = False) -> tuple[dict[str, Tensor], PersonalMeta]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = () if meta_only else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}", "there is no such personal state", "run this client first") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path}",
            f"it is damaged or no safetensors file ({error})",
            "restore it from a copy or delete it",
        ) from error
    if _FORMAT not in header:
        raise ArtifactError(f"{path}", f"it is not of format {_FORMAT}", "give a file of a run's personal folder")
    try:
        fields = json.loads(header[_FORMAT])
        for key in ("choice", "scales"):
            fields[key] = {name: tuple(values) for name, values in fields.get(key, {}).items()}
        return tensors, PersonalMeta(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}", f"its metadata is damaged ({error!r})", "restore it from a copy or delete it"
        ) from error
