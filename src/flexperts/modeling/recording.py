"""Recording of what modules compute: one forward pass per batch, with hooks for this pass only.

Shapes: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.data.batches import PaddedBatch
from flexperts.modeling.forward import Precision, autocast, hidden_states


class Recorder(Protocol):
    """Records something of every forward pass."""

    def hooks(self, mask: Tensor) -> Iterator[RemovableHandle]:
        """Register hooks for one pass and yield their handles; ``mask [B * S]`` is false on padding."""


@torch.no_grad()
def record(
    model: Any,
    recorders: Sequence[Recorder],
    batches: Iterable[PaddedBatch],
    precision: Precision,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> None:
    """Run every batch once with all recorders; their hooks are always removed, also after an error.

    Args:
        model: The base in eval mode (if PEFT has wrapped it, the inner model), with anything attached to it.
        recorders: The recorders.
        batches: The batches to run.
        precision: As in training.
        on_batch: Called with every batch before it is run; forward passes in it are not recorded.
    """
    device = next(model.parameters()).device
    for batch in batches:
        if on_batch:
            on_batch(batch)
        mask = batch.attention_mask.to(device).bool().flatten()
        with ExitStack() as stack, autocast(device, precision):
            for recorder in recorders:
                for handle in recorder.hooks(mask):
                    stack.callback(handle.remove)
            hidden_states(model, batch.input_ids, batch.attention_mask)


@dataclass
class _Mean:
    """A running mean of one layer's inputs ``[in]`` over tokens that are not padding."""

    total: Tensor | float = 0.0
    tokens: int = 0

    def hook(self, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a hook that adds a layer's input, ``[B, S, in]`` or ``[B, 1, S, in]``, where ``mask [B, S]``."""

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.total = self.total + args[0].flatten(0, -2)[mask.flatten()].double().sum(0)
            self.tokens += int(mask.sum())

        return add


@torch.no_grad()
def mean_inputs(
    model: Any, layers: Mapping[str, nn.Module], batches: Iterable[PaddedBatch], precision: Precision
) -> dict[str, Tensor]:
    """Return the mean input ``[in]`` of every layer over the batches' tokens, without padding, in fp32.

    Args:
        model: The base in eval mode, with anything attached to it.
        layers: Modules of ``model`` by name; each is called once in a forward pass.
        batches: The batches, at least one.
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
