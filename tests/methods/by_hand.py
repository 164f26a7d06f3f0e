"""Local training in plain torch, row by row on dense weights, to compare whole runs with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.batches import training_batches
from flexperts.methods.registry import make_method
from flexperts.seeding import generator

PLAIN = (
    "training.optimizer=sgd",
    "training.lr=10.0",
    "training.max_grad_norm=1e9",
    "training.weight_decay=0",
    "training.warmup_ratio=0",
    "training.local_steps=2",
    "training.batch_size=3",
    "training.micro_batch_size=1",
    "federation.rounds=3",
    "evaluation.max_new_tokens=1",
    "evaluation.rows=1",
)
STEPS, ROUNDS, RATE, SCALE = 2, 3, 10.0, 2.0
"""Local steps, rounds and rate of ``PLAIN``; alpha / r of the default LoRA."""
Deltas = Mapping[str, Tensor]
"""Module -> what is added to its weight."""


class Plain:
    """The tiny base and the clients' rows."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        workspace = Workspace(config)
        self.clients = sorted(workspace.clients)
        self.rows = {name: workspace.examples(name) for name in self.clients}
        model = ClientModel(workspace.base, config, make_method(config.method))
        with model.lend(model.site("clinic", self.rows["clinic"]), {}) as (split, _):
            self.start = {n: p.detach().clone() for n, p in split.trained.items()}
            self.start |= {n: p.detach().clone() for n, p in split.frozen.items() if "lora_" in n}
        model.close()
        loaded: Any = AutoModelForCausalLM.from_pretrained(Path(config.model.base), dtype=torch.float32)
        self.base: Any = loaded.eval().requires_grad_(False)
        self.weights = dict(self.base.named_parameters())

    def stream(self, client: str, number: int) -> Generator:
        """Return the round's stream of batches."""
        return generator(self.config.seed, client, number, "batches")

    def nll(self, row: Any, deltas: Deltas) -> Tensor:
        """Return the sum of a row's response NLL."""
        changed = {f"{module}.weight": self.weights[f"{module}.weight"] + d for module, d in deltas.items()}
        ids = torch.tensor([row.input_ids])
        logits = functional_call(self.base, changed, (), {"input_ids": ids}).logits[0]
        start = row.prompt_length
        return F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")

    def loss(self, rows: Sequence[Any], deltas: Callable[[], Deltas]) -> Tensor:
        """Return a batch's mean response NLL per token."""
        tokens = sum(len(row.input_ids) - row.prompt_length for row in rows)
        return torch.stack([self.nll(row, deltas()) for row in rows]).sum() / tokens

    def train(
        self, tensors: Sequence[Tensor], client: str, number: int, deltas: Callable[[], Deltas]
    ) -> list[Tensor]:
        """Take a round's SGD steps on some tensors, in place; return them."""
        batches = training_batches(self.rows[client], 3, STEPS, self.stream(client, number))
        for step, rows in enumerate(batches):
            sgd(tensors, self.loss(rows, deltas), cosine(RATE, (number - 1) * STEPS + step, ROUNDS * STEPS))
        return list(tensors)


def sgd(tensors: Sequence[Tensor], loss: Tensor, rate: float) -> None:
    gradients = torch.autograd.grad(loss, list(tensors))
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor -= rate * gradient


def cosine(rate: float, step: int, total: int) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * step / total))


def lora_layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (A, B), from tensors by PEFT's names."""
    pairs = {}
    for name in sorted(tensors):
        if name.startswith("base_model.model.") and ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pairs[module] = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
    return pairs


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that trains."""
    return tensor.detach().clone().requires_grad_()


def compare(pairs: Iterable[tuple[Tensor, Tensor, Tensor]], least: float = 0.02) -> None:
    """Compare (found, expected, start) with what training did to a tensor as the measure.

    Some gradients of the tiny base are small; the value that moved farthest must have moved by ``least``.
    """
    farthest = 0.0
    for found, expected, start in pairs:
        moved = float((expected - start).detach().abs().max())
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=2e-4 * moved + 1e-6)
        farthest = max(farthest, moved)
    assert farthest > least
