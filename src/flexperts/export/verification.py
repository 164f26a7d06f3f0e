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

_COMPUTE = """
import sys
import torch

assert {without!r} not in sys.modules
model.eval()
with torch.no_grad():
    logits = model(input_ids=tokens, use_cache=False).logits.float()
"""
_BEFORE = """\
from safetensors.torch import load_file, save_file

tokens = load_file({tokens!r})["tokens"]
"""
_AFTER = """
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
        how: What computed the export's logits.
    """

    largest: float
    relative: float
    same: float
    tokens: int
    how: str = "loaded in a fresh process"

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor, how: str = how) -> LogitDifference:
        """Compare logits ``[B, S, V]``."""
        off = logits - reference
        agree = logits.argmax(-1) == reference.argmax(-1)
        relative = off.square().mean().sqrt() / reference.std()
        return cls(off.abs().max().item(), relative.item(), agree.float().mean().item(), agree.numel(), how)

    @property
    def is_coarse(self) -> bool:
        """Whether it is more than rounding to float32 explains, so that rounding to a smaller type must."""
        return self.relative > _LIMITS[torch.float32]

    def __str__(self) -> str:
        return (
            f"{self.how}: largest logit difference {self.largest:.2g} ({100 * self.relative:.2g} % "
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
    logits = logits_in_fresh_process(loading + _COMPUTE.format(without=without), tokens)
    return within(_LIMITS[dtype], LogitDifference.between(logits, reference))


def logits_in_fresh_process(code: str, tokens: Tensor) -> Tensor:
    """Return the logits ``[B, S, V]`` that Python code, which finds ``tokens``, leaves as ``logits``."""
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "tokens.safetensors", Path(folder) / "logits.safetensors"
        save_file({"tokens": tokens}, ids)
        _run(_BEFORE.format(tokens=str(ids)) + code + _AFTER.format(logits=str(out)), Path(folder))
        return load_file(out)["logits"]


def within(limit: float, found: LogitDifference) -> LogitDifference:
    """Return a difference, or refuse the export if it is more than a limit of ``relative``."""
    if not found.relative <= limit:
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
