"""Grafts as one file: the trained tensors, the experts they started from, and the base they fit.

For code with its own training loop; in a run, ``parameters.store`` keeps personal state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.errors import ArtifactError
from flexperts.files import damaged
from flexperts.moe.layout import LayerExperts
from flexperts.parameters.fingerprint import fingerprint
from flexperts.parts.grafts import Grafts
from flexperts.parts.personal_expert import LowRankExpert, Rank

_FORMAT = "flexperts-grafts-1"


@dataclass(frozen=True)
class _Meta:
    """Settings to build the grafts again; ``base`` is the fingerprint of the experts modules that have grafts."""

    base: str
    choice: dict[str, tuple[int, ...]]
    scales: dict[str, tuple[float, ...]]
    rank: Rank
    alpha: float
    difference: bool = False


_META = TypeAdapter(_Meta)


def save_grafts(path: Path | str, grafts: Grafts) -> None:
    """Write grafts as safetensors, atomically; nothing of the base is written.

    Args:
        path: The file.
        grafts: The grafts, attached or not.

    Raises:
        ArtifactError: It cannot be written; an older file is left unchanged.
    """
    rank, alpha = _rank(grafts)
    meta = _Meta(_base(g.experts for g in grafts), grafts.choice, grafts.scales, rank, alpha, grafts.difference)
    write_sealed(Path(path), _FORMAT, grafts.state_dict(), asdict(meta))


def load_grafts(path: Path | str, experts: Sequence[LayerExperts]) -> Grafts:
    """Return the grafts in a file, trainable and not attached.

    Args:
        path: A file that ``save_grafts`` wrote.
        experts: The base's experts modules, from ``find_experts``.

    Raises:
        ArtifactError: The file is missing, damaged, does not hold grafts, or is for another base.
        GraftError: The base does not have the modules named in the file.
    """
    path = Path(path)
    tensors, value = read_sealed(path, _FORMAT)
    meta = _meta(path, value)
    grafts = Grafts(
        experts,
        meta.choice,
        rank=meta.rank,
        alpha=meta.alpha,
        scales=meta.scales,
        difference=meta.difference,
    )
    if _base(g.experts for g in grafts) != meta.base:
        raise ArtifactError(
            f"{path}", "its grafts were trained on the experts of another base", "load the base that they belong to"
        )
    try:
        grafts.load_state_dict(tensors)
    except RuntimeError as error:
        raise damaged(path, error) from error
    return grafts


def _rank(grafts: Grafts) -> tuple[Rank, float]:
    """Return LoRA's rank and alpha of the personal experts, which are the same in all layers."""
    expert = next((graft.personal[0] for graft in grafts), None)
    if isinstance(expert, LowRankExpert):
        rank = len(expert.up_lora_A)
        return rank, expert.scale * rank
    return "full", 1.0


def _base(experts: Iterable[LayerExperts]) -> str:
    return fingerprint(nn.ModuleList(e.module for e in experts))


def _meta(path: Path, value: Any) -> _Meta:
    try:
        return _META.validate_python(value)
    except ValidationError as error:
        raise damaged(path, f"its metadata is not that of grafts: {error.errors()[0]['loc']}") from error
