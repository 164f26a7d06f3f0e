"""What layers see on average: the mean of their inputs over rows' tokens.

Shapes: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexperts.data.batches import PaddedBatch
from flexperts.modeling.forward import Precision, autocast, hidden_states


@dataclass
class _Mean:
    """A running mean of one layer's inputs ``[in]`` over tokens that are not padding."""

    total: Tensor | float = 0.0
    tokens: int = 0

    def hook(self, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return what adds a layer's input ``[B, S, in]``, or ``[B, 1, S, in]``, where ``mask [B, S]`` is set."""

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.total = self.total + args[0].flatten(0, -2)[mask.flatten()].double().sum(0)
            self.tokens += int(mask.sum())

        return add


@torch.no_grad()
def mean_inputs(
    model: Any, layers: Mapping[str, nn.Module], batches: Iterable[PaddedBatch], precision: Precision
) -> dict[str, Tensor]:
    """Return the mean input ``[in]`` of every layer over the batches' tokens, in fp32, padding left out.

    Args:
        model: The base, in eval mode, with whatever is hung onto it.
        layers: Modules of ``model`` by name; each is called once in a forward pass.
        batches: At least one.
        precision: As in training.
    """
    device = next(model.parameters()).device
    means = {name: _Mean() for name in layers}
    for batch in batches:
        mask = batch.attention_mask.to(device).bool()
        with ExitStack() as hooks, autocast(device, precision):
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(means[name].hook(mask)).remove)
            hidden_states(model, batch.input_ids, batch.attention_mask)
    return {name: torch.as_tensor(mean.total / mean.tokens).float() for name, mean in means.items()}
