"""Training of routed LoRA experts written out: plain modules in a plain model, row by row, with plain SGD."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.batches import training_batches
from flexperts.methods.registry import make_method
from flexperts.seeding import generator

SGD = (
    "training.optimizer=sgd",
    "training.lr=4.0",
    "lora.alpha=128",
    "training.weight_decay=0",
    "training.max_grad_norm=1e9",
    "training.local_steps=2",
    "evaluation.rows=1",
    "evaluation.max_new_tokens=1",
)
STEPS, RATE, SCALE, SITES = 2, 4.0, 16.0, "mixture.sites."


class Routed(nn.Module):
    """y = W x + s sum_k w_k B_{e(k)} A_{e(k)} x, slot by slot; s is large, so that a few steps matter."""

    def __init__(
        self, linear: nn.Module, tensors: Mapping[str, Tensor], start: str, slots: Sequence[int], best: int
    ) -> None:
        super().__init__()
        self.linear, self.tensors, self.start = linear, tensors, start
        self.slots, self.best = slots, best

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        weights = torch.ones(*x.shape[:-1], 1)
        if len(self.slots) > 1:
            weights = (x @ self.tensors[f"{self.start}.router"].T).softmax(-1)
            weights = weights * (weights >= weights.sort(-1, descending=True).values[..., self.best - 1, None])
            weights = weights / weights.sum(-1, keepdim=True)
        for k, e in enumerate(self.slots):
            A, B = (self.tensors[f"{self.start}.experts.{e}.{side}"] for side in "AB")
            y = y + SCALE * weights[..., k, None] * (x @ A.T @ B.T)
        return y


def layers_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the adapted modules."""
    return sorted({n.removeprefix(SITES).split(".")[0].replace("/", ".") for n in tensors})


def routed_model(base: Path, tensors: Mapping[str, Tensor], slots: Sequence[int], best: int) -> Any:
    """Return the plain base with these experts beside its attention layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    for layer in layers_of(tensors):
        parent, _, name = layer.rpartition(".")
        module = Routed(model.get_submodule(layer), tensors, SITES + layer.replace(".", "/"), slots, best)
        setattr(model.get_submodule(parent), name, module)
    return model


class Loop:
    """What both methods' loops need of a run: starts, rows, learning rates and who took part."""

    def __init__(self, config: RunConfig, base: Path, run: Path) -> None:
        self.config, self.base = config, base
        self.workspace, method = Workspace(config), make_method(config.method)
        model = ClientModel(self.workspace.base, config, method)
        with model.lend(model.site("clinic", ()), {}) as (split, _):
            everything = {**split.trained, **split.frozen}
            self.start = {n: p.detach().clone() for n, p in everything.items() if n.startswith(SITES)}
        model.close()
        logs = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        self.participants = [sorted(log["clients"]) for log in logs]

    def train(
        self,
        client: str,
        number: int,
        tensors: Mapping[str, Tensor],
        trained: Callable[[str], bool],
        slots: Sequence[int],
        best: int,
        factor: Callable[[str], float] = lambda name: 1.0,
    ) -> dict[str, Tensor]:
        """Return all tensors after a client's steps in a round; ``factor`` scales a tensor's rate."""
        leaves = {n: t.clone().requires_grad_(trained(n)) for n, t in tensors.items()}
        model = routed_model(self.base, leaves, slots, best)
        for rows, rate in zip(self._batches(client, number), self._rates(number), strict=True):
            nll, tokens = torch.zeros(()), 0
            for row in rows:
                ids, first = torch.tensor([row.input_ids]), row.prompt_length
                logits = model(input_ids=ids).logits[0]
                nll = nll + F.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
                tokens += len(row.input_ids) - first
            (nll / tokens).backward()
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    leaf.data -= rate * factor(name) * leaf.grad
                    leaf.grad = None
        return {n: leaf.detach() for n, leaf in leaves.items()}

    def _batches(self, client: str, number: int) -> Iterator[Sequence[Any]]:
        stream = generator(self.config.seed, client, number, "batches")
        return training_batches(self.workspace.examples(client), self.config.training.batch_size, STEPS, stream)

    def _rates(self, number: int) -> list[float]:
        whole = self.config.federation.rounds * STEPS
        steps = range((number - 1) * STEPS, number * STEPS)
        return [RATE * 0.5 * (1 + math.cos(math.pi * step / whole)) for step in steps]
