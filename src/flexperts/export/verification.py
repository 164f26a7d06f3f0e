"""Loading an export in a fresh process, as its users will, and comparing its logits with the run's."""

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
"""What the logits are compared on; it comes from no silo."""

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
"""How far logits may be off, root mean square over their standard deviation: rounding, and nothing else."""


@dataclass(frozen=True)
class Difference:
    """How far an export's logits are from the run's.

    Args:
        largest: The largest difference of a logit.
        relative: Root mean square of the differences over the logits' standard deviation.
        same: Share of the tokens whose likeliest successor is the same.
        tokens: How many tokens were compared.
    """

    largest: float
    relative: float
    same: float
    tokens: int

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor) -> Difference:
        """Compare logits ``[B, S, V]``."""
        off = logits - reference
        agree = logits.argmax(-1) == reference.argmax(-1)
        relative = off.square().mean().sqrt() / reference.std()
        return cls(off.abs().max().item(), relative.item(), agree.float().mean().item(), agree.numel())

    def __str__(self) -> str:
        return (
            f"loaded in a fresh process: largest logit difference {self.largest:.2g} ({100 * self.relative:.2g} % "
            f"of the logits' spread), same next token at {round(self.same * self.tokens)} of {self.tokens} places"
        )


def verify(
    loading: str, tokens: Tensor, reference: Tensor, dtype: torch.dtype, *, without: str = "flexperts"
) -> Difference:
    """Run loading code in a fresh process and compare the logits of ``model`` in it with the run's.

    Args:
        loading: Python code that binds ``model``.
        tokens: Token ids ``[B, S]``.
        reference: The run's logits on them ``[B, S, V]``.
        dtype: The coarsest type that it is stored or computed in.
        without: A package that the code must do without.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "tokens.safetensors", Path(folder) / "logits.safetensors"
        save_file({"tokens": tokens}, ids)
        code = loading + _COMPARE.format(without=without, tokens=str(ids), logits=str(out))
        _run(code, Path(folder))
        found = Difference.between(load_file(out)["logits"], reference)
    if not found.relative <= _LIMITS[dtype]:
        raise ArtifactError(
            "the export",
            f"it computes something else than the run ({found})",
            "use `flexperts generate` on the run",
        )
    return found


def _run(code: str, folder: Path) -> None:
    # transformers keeps copies of a folder's own code; these must not outlive the check.
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ArtifactError("the export", f"a fresh process cannot load it ({said[-1]})", "use another --form")
