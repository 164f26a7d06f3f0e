"""Comparison of the systems' averaged adapters: loss on rows not used in training, and their distance.

python benchmarks/performance/rival_systems/judge.py FOLDER CLIENTS REFERENCE ADAPTER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from trainer_per_client import adapted_model
from work import Work

from flexperts.data.batches import pad_batch
from flexperts.modeling.forward import token_losses

ROWS = 16


def main(folder: str, clients: str, reference: str, *adapters: str) -> None:
    """Print as JSON: adapter -> ``loss`` and ``distance``; under ``start`` the untouched base's loss."""
    work = Work(Path(folder), int(clients), 1)
    model = adapted_model(work).eval().float()
    rows = [row for name in sorted(work.clients) for row in work.clients[name].test][:ROWS]
    batch = pad_batch(work.encoder.encode_all(rows), work.encoder.tokenizer.pad_token_id)

    @torch.no_grad()
    def loss() -> float:
        sums, counts = token_losses(model, batch)
        return float(sums.sum() / counts.sum())

    told: dict[str, dict[str, float]] = {"start": {"loss": loss()}}
    ours = load_file(reference)
    for adapter in adapters:
        tensors = load_file(adapter)
        set_peft_model_state_dict(model, tensors)
        told[adapter] = {"loss": loss(), "distance": distance(tensors, ours)}
    print(json.dumps(told))


def distance(tensors: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Return the norm of the difference over that of ours, of all B: they start at zero."""
    if tensors.keys() != ours.keys():
        raise SystemExit("the adapters hold different tensors")
    learned = [name for name in ours if "lora_B" in name]
    apart = sum(float((tensors[name] - ours[name]).square().sum()) for name in learned)
    return float((apart / sum(float(ours[name].square().sum()) for name in learned)) ** 0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
