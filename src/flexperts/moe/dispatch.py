"""How transformers computes a layer's routed experts on a card.

Its grouped product (``grouped_mm``) reads every expert once, and is one kernel only where a card has that kernel;
elsewhere it is a loop that waits for the card. Its batched product (``batched_mm``) copies one expert's weights for
each pair of a token and a chosen expert: cheap for the few pairs of a decoding step, and it never waits.
transformers' own ``generate`` changes over in the same way, for a whole generation; here each call decides, so
serving, scoring and training need to do nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

BY_PAIRS = "flexperts_by_pairs"
"""The name, for ``from_pretrained(experts_implementation=...)``."""


def by_pairs(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the routed output ``[T, D]``: batched with at most half as many pairs as experts, else grouped.

    On a CPU the grouped product is the faster one for any number of pairs.

    Args:
        experts: Fused experts of transformers.
        hidden: ``[T, D]``.
        index, weights: Each token's experts and their weights, ``[T, K]``.
    """
    few = hidden.device.type != "cpu" and 2 * index.numel() <= experts.num_experts
    way = batched_mm_experts_forward if few else grouped_mm_experts_forward
    output: Tensor = way(experts, hidden, index, weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(BY_PAIRS, by_pairs)
