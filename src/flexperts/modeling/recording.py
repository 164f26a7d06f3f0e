"""Watching modules at work: one forward pass per batch, with hooks that recorders hang for that pass alone.

Shapes: B rows, S columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
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
