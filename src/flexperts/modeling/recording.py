"""Watching modules at work: one forward pass per batch, with hooks for that pass alone.

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
    """What notes something of every forward pass."""

    def hooks(self, mask: Tensor) -> Iterator[RemovableHandle]:
        """Hang hooks for one pass and yield their handles; ``mask [B * S]`` is true on tokens, false on padding."""


@torch.no_grad()
def record(
    model: Any,
    recorders: Sequence[Recorder],
    batches: Iterable[PaddedBatch],
    precision: Precision,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> None:
    """Run every batch once, all recorders watching; no hook of theirs is left behind, not even after an error.

    Args:
        model: The base in eval mode (where PEFT has wrapped it, what is inside), with whatever is hung onto it.
        recorders: What watches.
        batches: What is run.
        precision: As in training.
        on_batch: Gets every batch before it is run; what it runs itself is not recorded.
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
