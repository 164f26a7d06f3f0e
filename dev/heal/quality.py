"""How a split model compares with its dense parent, and how much its experts differ, on the held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from distillation import divergence
from torch import Tensor

from flexperts.moe.experts import find_experts
from flexperts.seeding import generator
from flexperts.selection.selection import LayerScores, reconstruction_scores

Quality = dict[str, Any]


@torch.no_grad()
def quality(parent: Any, model: Any, texts: Sequence[Sequence[int]]) -> Quality:
    """Return a split model's numbers as JSON values, means over the predicted tokens of all texts.

    "loss" and "parent_loss": nats per token. "kl": KL(parent || split), in nats. "same_top": share of tokens for
    which both predict the same token. "layers", for each split layer:
        "share" [N]: each expert's share of the choices;
        "norm" [N]: root mean square over all tokens of the norm of each expert's output, chosen or not;
        "spread": the norms' standard deviation over their mean;
        "error" [N]: squared distance of each expert alone from the routed output, over that output's energy.
    A text's first token is left out of "layers": its activations do not depend on the text.

    Args:
        parent, model: Both on one device; without terms attached.
        texts: Tokens of each text.
    """
    rows = [torch.tensor([tokens], device=model.device) for tokens in texts]
    sums = torch.stack([_compared(parent, model, ids) for ids in rows]).sum(0)
    means = (sums / sum(ids.shape[1] - 1 for ids in rows)).tolist()
    layers = {scores.name: _described(scores) for scores in _scores(model, rows)}
    return {**dict(zip(("loss", "parent_loss", "kl", "same_top"), means, strict=True)), "layers": layers}


def _compared(parent: Any, model: Any, ids: Tensor) -> Tensor:
    """Return sums over one text's predicted tokens, in fp64 on the CPU."""
    wanted, ours = (m(input_ids=ids, use_cache=False).logits[:, :-1].float() for m in (parent, model))
    next_ones = ids[0, 1:]
    parts = (
        F.cross_entropy(ours[0], next_ones, reduction="none"),
        F.cross_entropy(wanted[0], next_ones, reduction="none"),
        divergence(wanted, ours)[0],
        (wanted.argmax(-1) == ours.argmax(-1))[0],
    )
    return torch.stack([part.double().sum().cpu() for part in parts])


def _scores(model: Any, rows: Sequence[Tensor]) -> list[LayerScores]:
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    for batch in batches:
        batch["attention_mask"][:, 0] = 0  # chooses the tokens that are scored; the model reads all
    return reconstruction_scores(
        lambda batch: model.model(input_ids=batch["input_ids"], use_cache=False),
        find_experts(model),
        batches,
        max_tokens=sum(ids.numel() for ids in rows),
        generator=generator(0),
    )


def _described(scores: LayerScores) -> dict[str, Any]:
    norms = (scores.gram.diagonal() / scores.tokens).sqrt()
    return {
        "share": (scores.counts / scores.counts.sum()).tolist(),
        "norm": norms.tolist(),
        "spread": float(norms.std(correction=0) / norms.mean()),
        "error": scores.relative.tolist(),
    }


def table(before: Quality, after: Quality) -> str:
    """Return both as Markdown, before and after healing."""
    lines = ["| | before | after |", "|---|---:|---:|"]
    for key, name in (("loss", "loss"), ("kl", "KL to the parent"), ("same_top", "same top token")):
        lines.append(f"| {name} | {before[key]:.3f} | {after[key]:.3f} |")
    lines += [f"| the parent's loss | {before['parent_loss']:.3f} | {after['parent_loss']:.3f} |", ""]
    lines += ["| layer | share of choices | spread of norms | error, best and worst expert |", "|---|---|---|---|"]
    for name, was in before["layers"].items():
        layer, now = name.split(".")[2], after["layers"][name]
        shares, errors = ([f"{min(v[k]):.3f} to {max(v[k]):.3f}" for v in (was, now)] for k in ("share", "error"))
        spreads = [f"{v['spread']:.3f}" for v in (was, now)]
        lines.append("| " + " | ".join([layer, *(" → ".join(pair) for pair in (shares, spreads, errors))]) + " |")
    return "\n".join(lines)
