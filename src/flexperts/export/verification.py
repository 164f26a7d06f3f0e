"""Check of an export: load it in a fresh process, as its users will, and compare its logits with the run's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexperts.errors import ArtifactError

REFERENCE_TEXT = (
    "Dear colleague, thank you for the letter of last week. We have read it twice, and three questions remain: who "
    "signs, when does the term begin, and what happens if the parcel is late?"
)
"""The text on which logits are compared; it is not from any silo."""

_COMPARE = """
import sys
import torch
from safetensors.torch import load_file, save_file

assert {without!r} not in sys.modules
model.eval()
with torch.no_grad():
    logits = model(input_ids=load_file({tokens!r})["tokens"], use_cache=False).logits.float()
save_file({{"logits": logits}}, {logits!r})
"""
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of logits that rounding explains: root mean square over the logits' standard deviation."""


@dataclass(frozen=True)
class LogitDifference:
    """Difference between an export's logits and the run's.

    Args:
        largest: The largest difference of a logit.
        relative: Root mean square of the differences over the logits' standard deviation.
        same: Share of the tokens whose likeliest successor is the same.
        tokens: Number of compared tokens.
    """

    largest: float
    relative: float
    same: float
    tokens: int

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor) -> LogitDifference:
        """Compare logits ``[B, S, V]``."""
        off = logits - reference
        agree = logits.argmax(-1) == reference.argmax(-1)
        relative = off.square().mean().sqrt() / reference.std()
        return cls(off.abs().max().item(), relative.item(), agree.float().mean().item(), agree.numel())

    @property
    def is_coarse(self) -> bool:
        """Whether it is more than rounding to float32 explains, so that rounding to bfloat16 must."""
        return self.relative > _LIMITS[torch.float32]

    def __str__(self) -> str:
        return (
            f"loaded in a fresh process: largest logit difference {self.largest:.2g} ({100 * self.relative:.2g} % "
            f"of the logits' spread), same next token at {round(self.same * self.tokens)} of {self.tokens} places"
        )


def verify(
    loading: str, tokens: Tensor, reference: Tensor, dtype: torch.dtype, *, without: str = "flexperts"
) -> LogitDifference:
    """Run loading code in a fresh process and compare the logits of its ``model`` with the run's.

    Args:
        loading: Python code that loads the export as ``model``.
        tokens: Token ids ``[B, S]``.
        reference: The run's logits on these tokens, ``[B, S, V]``.
        dtype: The least precise type in which the model is stored or computed.
        without: A package that the code must not import.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "tokens.safetensors", Path(folder) / "logits.safetensors"
        save_file({"tokens": tokens}, ids)
        code = loading + _COMPARE.format(without=without, tokens=str(ids), logits=str(out))
        _run(code, Path(folder))
        found = LogitDifference.between(load_file(out)["logits"], reference)
    if not found.relative <= _LIMITS[dtype]:
        raise ArtifactError(
            "the export",
            f"its logits differ from the run's by more than rounding ({found})",
            "use the model in the run with `flexperts generate`, and report this as an issue",
        )
    return found


def _run(code: str, folder: Path) -> None:
    # transformers caches copies of a folder's code; these must not remain after the check.
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ArtifactError("the export", f"a fresh process cannot load it ({said[-1]})", "use another --form")
