"""Values from a client's train rows, kept so that its model can be used without them; see ``Method.settle``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexperts.checked_file import read_sealed, write_sealed

_FORMAT = "flexperts-settled-1"


@dataclass(frozen=True)
class Settled:
    """A client's file of such values. They are valid for one model only.

    Args:
        path: The file.
        base: Fingerprint of the base.
        round: Last round in which the personal state was trained.
        shared: Hash of the shared weights.
    """

    path: Path
    base: str
    round: int
    shared: str

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file's tensors."""
        write_sealed(self.path, _FORMAT, tensors, self._of())

    def load(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors kept for this model; empty if there are none, or they are for another model."""
        if not self.path.exists():
            return {}
        tensors, of = read_sealed(self.path, _FORMAT)
        return {name: tensor.to(device) for name, tensor in tensors.items()} if of == self._of() else {}

    def _of(self) -> dict[str, str | int]:
        return {name: value for name, value in asdict(self).items() if name != "path"}
