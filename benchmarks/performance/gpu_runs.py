"""The card tier's sections on whole runs, and on every family."""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from figures import Figure
from gpu_card import Card, section
from safetensors.torch import load_file

from flexperts.config.model import LoraConfig
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.environment import DEVICE
from flexperts.modeling.forward import autocast
from flexperts.modeling.lora import LoraAdapters
from flexperts.observer import Observer
from flexperts.recipe import parse_recipe
from flexperts.testing import FAMILIES, save_tiny_base, tiny_model

SETTINGS = {
    "dropout, checkpointing, two experts": (
        "lora.dropout=0.1",
        "training.gradient_checkpointing=true",
        "graft.experts=2",
    ),
    "experts of a layer in the CPU's memory": (
        "model.device_map={'model.layers.1'='cpu'}",
        "graft.rank=4",
        "training.gradient_checkpointing=true",
    ),
    "nf4": ("model.quantization=nf4",),
    "int8": ("model.quantization=int8",),
}
"""Name -> what is changed in a run of one round."""


class _StoppedError(Exception):
    """A run was stopped on purpose."""


class _StopAfterOne(Observer):
    def round(self, record: dict[str, Any]) -> None:
        """Stop after the first round."""
        raise _StoppedError


@section(
    "Runs on a card",
    "A tiny random base, four shipped silos, two rounds of FLEx; then one round with other settings.",
    90,
    "The differences are the largest between any two values of the run's weights.",
)
def runs(card: Card) -> Iterator[Figure]:
    """Whether two runs are equal, a resumed one too, and whether card and CPU agree."""
    gc.collect()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = save_tiny_base(work / "base", max_position_embeddings=1024)

        def recipe(*more: str) -> RunConfig:
            return parse_recipe(
                f'[model]\nbase = "{base}"\n[data.silos]\ntrain_rows = 8\ntest_rows = 4\n'
                "[training]\nmax_length = 640\nlocal_steps = 4\n[federation]\nrounds = 2\n"
                "[evaluation]\nmax_new_tokens = 4\n",
                more,
            )

        first = _on(card.device, recipe(), work / "first")
        _on(card.device, recipe(), work / "second")
        yield Figure("two runs: difference", _difference(work / "first", work / "second"), "", at_most=0)
        try:
            _on(card.device, recipe(), work / "third", _StopAfterOne())
        except _StoppedError:
            _on(card.device, recipe(), work / "third", resume=True)
        yield Figure("unbroken and resumed: difference", _difference(work / "first", work / "third"), "", at_most=0)
        other = _on(torch.device("cpu"), recipe(), work / "cpu")
        apart = [
            abs(value - other["clients"][client]["nll"][state])
            for client, scores in first["clients"].items()
            for state, value in scores["nll"].items()
        ]
        yield Figure("card and CPU: largest difference of a NLL", max(apart), "", at_most=0.02)
        for number, (what, settings) in enumerate(SETTINGS.items()):
            if what in ("nf4", "int8") and find_spec("bitsandbytes") is None:
                continue
            told = _on(card.device, recipe("federation.rounds=1", *settings), work / f"with-{number}")
            nlls = [value for scores in told["clients"].values() for value in scores["nll"].values()]
            yield Figure(
                f"{what}: scores that are not finite", sum(not math.isfinite(x) for x in nlls), "", at_most=0
            )


def _on(device: torch.device, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Return the summary of a run on a device."""
    with patch.dict(os.environ, {DEVICE: str(device)}):
        return run_federation(*arguments, **options)


def _difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights of two run directories."""
    found = [0.0]
    for path in sorted(one.rglob("*.safetensors")):
        ours, theirs = load_file(path), load_file(other / path.relative_to(one))
        found += [float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours if ours[n].numel()]
    return max(found)


@section(
    "Families on a card",
    "A tiny model of every supported family in bf16 with LoRA: a forward and backward pass in bf16 autocast, "
    "4 rows of 64 tokens, one with 30 columns of padding.",
    90,
)
def families(card: Card) -> Iterator[Figure]:
    """Families that fail."""
    for family in sorted(FAMILIES)[:: 20 if card.tiny else 1]:
        yield Figure(f"{family}: gradients that are not finite", _family(card, family), "", at_most=0)


def _family(card: Card, family: str) -> int:
    model = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=256).to(card.device)
    lora = LoraAdapters(model, LoraConfig(rank=4, alpha=8, projections=()), seed=0)
    lora.model.train()
    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0)).to(card.device)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    with autocast(card.device, "bf16"):
        loss = (
            lora.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -8:].float().square().mean()
        )
    loss.backward()
    gradients: Sequence[torch.Tensor] = [p.grad for p in lora.parameters().values() if p.grad is not None]
    return sum(int((~t.isfinite()).sum()) for t in gradients) if gradients else 1
