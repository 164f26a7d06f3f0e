"""The check of an export in this process, in place of the one in a fresh process, which takes seconds to start."""

from __future__ import annotations

from typing import Any

from torch import Tensor, dtype

from flexperts.export.content import logits_of
from flexperts.export.verification import LogitDifference


def verify(code: str, tokens: Tensor, reference: Tensor, precision: dtype, *, without: str) -> LogitDifference:
    """Return the difference of logits; see ``flexperts.export.verification.verify``."""
    names: dict[str, Any] = {}
    exec(code, names)
    return LogitDifference.between(logits_of(names["model"].eval(), tokens), reference)
