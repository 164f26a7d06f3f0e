"""Prompts that are read once, for all that follows them: their responses are scored and their answers decoded.

Shapes: B rows, C columns, R response columns, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexperts.data.batches import IGNORED, PaddedBatch
from flexperts.modeling.caches import sharing
from flexperts.modeling.forward import last_logits, next_logits


@dataclass(frozen=True)
class ReadPrompts:
    """What reading a batch of prompts leaves.

    Args:
        logits: Of each prompt's next token, ``[B, V]`` fp32.
        mask: 1 on tokens and 0 on padding, ``[B, C]``.
        cache: Keys and values of the C columns.
    """

    logits: Tensor
    mask: Tensor
    cache: Any

    @property
    def can_go_on(self) -> bool:
        """Whether several columns can be read on top: running states, and caches of a model's own, take one."""
        return sharing(self.cache) == "any time"


def read_prompts(model: Any, prompts: PaddedBatch) -> ReadPrompts:
    """Read a batch of prompts."""
    device = next(model.parameters()).device
    mask = prompts.attention_mask.to(device)
    logits, cache = next_logits(model, prompts.input_ids.to(device), mask)
    return ReadPrompts(logits, mask, cache)


def response_losses(model: Any, read: ReadPrompts, responses: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return what ``token_losses`` does, from prompts that are read already and can go on; these stay as they are.

    Args:
        model: The model that has read the prompts.
        read: What reading them left.
        responses: Their responses, padded on the right; each has at least one token.
    """
    labels = responses.labels.to(read.mask.device)
    logits = read.logits[:, None]
    if (columns := responses.response_columns - 1) > 0:  # nothing is predicted from the last one
        ids, mask = (t[:, :columns].to(read.mask.device) for t in (responses.input_ids, responses.attention_mask))
        whole = torch.cat([read.mask, mask], dim=1)
        more, _ = last_logits(model, ids, whole, copy.deepcopy(read.cache), keep=columns)
        logits = torch.cat([logits, more], dim=1)
    wanted = labels != IGNORED
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[wanted] = F.cross_entropy(logits[wanted], labels[wanted], reduction="none")
    return losses.sum(1), wanted.sum(1)
