"""Does the reconstruction rule choose the expert with the smallest output? By base, as a Markdown table.

python benchmarks/selection_leaning.py

Bases: smol-moe on the quick start's rows (24 layers: 6 of 4 silos), and tiny random Qwen2-MoE models on random
tokens (20 layers: 2 of 10 seeds), both with ``norm_topk_prob`` true and false. Minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from scipy.stats import spearmanr

from flexperts.client.workspace import Workspace
from flexperts.moe.experts import find_experts
from flexperts.recipe import load_recipe
from flexperts.seeding import generator
from flexperts.selection.rules import select, subset_error
from flexperts.selection.selection import CalibrationSettings, LayerScores, reconstruction_scores, score_experts
from flexperts.testing import tiny_model

HEADER = (
    "| base | top-k weights of a token | layers | smallest output chosen | rank correlation of loss and output |"
    " error at the best factor, chosen by `reconstruction` | by `scaled` |"
)


def smol_moe(normalised: bool) -> Iterator[LayerScores]:
    """Yield the sums of every silo's layers."""
    config = load_recipe("recipes/quickstart.toml", [])
    workspace = Workspace(config)
    model: Any = workspace.base.model
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = normalised
    pad, precision = workspace.base.tokenizer.pad_token_id, config.model.precision
    settings = CalibrationSettings(config.graft, config.training.rows_per_pass, pad, precision)
    for client in workspace.clients:
        stream = generator(config.seed, client, "calibration")
        yield from score_experts(model, find_experts(model), workspace.examples(client), settings, stream)


def tiny(normalised: bool) -> Iterator[LayerScores]:
    """Yield the sums of the layers of ten models."""
    for seed in range(10):
        model, stream = tiny_model(seed=seed, norm_topk_prob=normalised), torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 250, (8, 64), generator=stream)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield from reconstruction_scores(
            lambda b, model=model: model(**b),
            find_experts(model),
            [batch],
            max_tokens=ids.numel(),
            generator=stream,
        )


def line(name: str, layers: list[LayerScores]) -> str:
    """Return one row of the table."""
    sizes = [layer.gram.diagonal() for layer in layers]
    smallest = sum(int(size.argmin()) == layer.best(1)[0] for size, layer in zip(sizes, layers, strict=True))
    rank = mean(spearmanr(size, layer.errors).statistic for size, layer in zip(sizes, layers, strict=True))
    left = [
        mean(subset_error(layer, select(rule, layer, 1, torch.Generator())) / layer.energy for layer in layers)
        for rule in ("reconstruction", "scaled")
    ]
    weights = mean(float(layer.weights.sum()) / layer.tokens for layer in layers)
    return f"| {name} | {weights:.2f} | {len(layers)} | {smallest} | {rank:+.2f} | {left[0]:.3f} | {left[1]:.3f} |"


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(HEADER + "\n|---|---:|---:|---:|---:|---:|---:|")
    for normalised in (True, False):
        print(line(f"`smol-moe`, `norm_topk_prob = {str(normalised).lower()}`", list(smol_moe(normalised))))
        print(line(f"tiny Qwen2-MoE, `norm_topk_prob = {str(normalised).lower()}`", list(tiny(normalised))))
