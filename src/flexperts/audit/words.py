"""Words in an update: which tokens' inputs make up the change of the first adapted layers' A.

LoRA computes B A x. The gradient of A on some tokens is the sum of outer products (B^T d_t) x_t^T, so each of its
rows is a weighted sum of the layer's inputs x_t. In the first block an input is a function of its token alone. With
base, B and change known, the tokens are found by matching the gradient: the fewest inputs of which the change is a
weighted sum. The weights depend on all else and are left free. So one step's gradient, the sum of several steps, a
mean over silos and a change with noise are attacked alike. In a run's first step B is zero, and A has no gradient.

arXiv 2601.17533 finds bags of words in adapters' gradients too, from other traces, and orders them; here they are
not ordered. Petrov et al., 2024 (arXiv 2405.15586) test each token against the gradient's span, which decides for
as many tokens as the span has dimensions. Here the best next token is chosen again and again (matching pursuit for
several vectors; Tropp et al., 2006), which can find more tokens than that.

Shapes: V vocabulary, D input width, M rows of all A's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexperts.modeling.forward import Precision, autocast
from flexperts.modeling.lora import SHARED_PREFIX, LoraAdapters

_COLUMNS = 512
"""Tokens read in one pass."""
_SHARE = 4
"""At most D over this many tokens are named: of many more, any change is a weighted sum."""
_LEAST = 1e-6
"""Share of an input's or a change's size below which rounding decides."""


class _InputRead(Exception):  # noqa: N818 - no error: it ends a forward pass after the layer whose input was wanted
    pass


def first_layers(lora: LoraAdapters, change: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the adapted layers that read what the first one reads, with the names of their A in an update.

    Empty if the update has none of them: the method does not share A.
    """
    parent = lora.targets[0].rpartition(".")[0]
    width = lora.base.get_submodule(lora.targets[0]).in_features
    together = [
        target
        for target in lora.targets
        if target.rpartition(".")[0] == parent and lora.base.get_submodule(target).in_features == width
    ]
    names = {target: f"{SHARED_PREFIX}model.{target}.lora_A.weight" for target in together}
    return {target: name for target, name in names.items() if name in change}


@torch.no_grad()
def token_inputs(lora: LoraAdapters, target: str, precision: Precision) -> Tensor | None:
    """Return every token's input to a layer, ``[V, D]`` in fp32; None if it depends on the tokens before it.

    Args:
        lora: The base with its adapters.
        target: An adapted layer of the first block.
        precision: As in training.
    """
    layer, found = lora.module(target), list[Tensor]()
    device = next(lora.base.parameters()).device

    def read(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach().float().flatten(0, -2).cpu())
        raise _InputRead

    tokens = torch.arange(lora.base.get_input_embeddings().weight.shape[0], device=device)
    handle = layer.register_forward_pre_hook(read)
    try:
        for some in (*torch.split(tokens, _COLUMNS), tokens[:_COLUMNS].flip(0)):
            try:
                with autocast(device, precision):
                    lora.base(input_ids=some[None], use_cache=False)
            except _InputRead:
                pass
    finally:
        handle.remove()
    inputs, again = torch.cat(found[:-1]), found[-1].flip(0)
    return inputs if torch.allclose(inputs[: len(again)], again, rtol=1e-3, atol=1e-5) else None


def matched(change: Tensor, inputs: Tensor, known: Collection[int], count: int) -> list[int]:
    """Return the tokens whose inputs make up a change, the best match first.

    In each step the token is chosen that explains most of the change together with those before it. All directions
    of the change count alike, however large: a token with a small gradient is as much in it as another.

    Args:
        change: ``[M, D]``; each row is a sum of inputs with unknown weights, and maybe noise.
        inputs: ``[V, D]``.
        known: Tokens that are in the rows anyway, such as the template's; they are explained first and not named.
        count: Number of tokens to name.
    """
    _, sizes, directions = torch.linalg.svd(change, full_matrices=False)
    change = directions[sizes > _LEAST * sizes[0]]
    left = (inputs**2).sum(1)  # of every input, what is not a sum of the chosen ones
    whole = left.clone()
    agreement = inputs @ change.T  # [V, M], with what is not explained yet
    basis, free = inputs.new_zeros(0, inputs.shape[1]), torch.ones(len(inputs), dtype=torch.bool)
    named: list[int] = []
    pending = sorted(known)
    while len(named) < count:
        usable = free & (left > _LEAST * whole)
        if pending:
            token = pending.pop()
        elif usable.any():
            token = int(torch.where(usable, (agreement**2).sum(1) / left, -1.0).argmax())
            named.append(token)
        else:
            break
        free[token] = False
        axis = inputs[token]
        for _ in range(2):  # the second pass removes what rounding has left
            axis = axis - (basis @ axis) @ basis
        if not usable[token] or not (size := axis.norm()) > 0:
            continue
        axis = axis / size
        along = inputs @ axis
        left = (left - along**2).clamp(min=0)
        agreement -= along[:, None] * (change @ axis)
        basis = torch.cat([basis, axis[None]])
    return named


def word_attack(
    change: Mapping[str, Tensor],
    lora: LoraAdapters,
    precision: Precision,
    rows: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
) -> dict[str, Any] | None:
    """Return how many of a silo's words an observer finds in an update; None if there is nothing to attack.

    Args:
        change: The update, by tensor.
        lora: The base with its adapters.
        precision: As in training.
        rows: Token ids of the rows that were trained on.
        others: Token ids of other silos' rows, which the observer may have: tokens in all of them are the
            template's, and their most frequent tokens are what can be guessed without any update.

    Returns:
        ``true`` (different tokens of the rows), ``named``, ``right``, and ``guessed``: right ones of as many
        guesses. ``own`` has the same for tokens that no other silo's row has; guesses are then the first tokens of
        the vocabulary, which are the most frequent ones in public text.
    """
    layers = first_layers(lora, change)
    if not any(change[name].any() for name in layers.values()):
        return None
    inputs = token_inputs(lora, next(iter(layers)), precision)
    if inputs is None:
        return None
    template = set.intersection(*map(set, others))
    true = set().union(*rows) - template
    count = min(len(true), inputs.shape[1] // _SHARE)
    named = matched(torch.cat([change[name] for name in layers.values()]), inputs, template, count)
    frequent = Counter(token for row in others for token in row if token not in template)
    own = [token for token in range(len(inputs)) if token not in frequent and token not in template]
    return {
        **_counted(true, named, [token for token, _ in frequent.most_common()]),
        "own": _counted(true.intersection(own), [token for token in named if token in set(own)], own),
    }


def _counted(true: Collection[int], named: Sequence[int], guesses: Sequence[int]) -> dict[str, int]:
    right, guessed = (len(set(true).intersection(its)) for its in (named, guesses[: len(named)]))
    return {"true": len(true), "named": len(named), "right": right, "guessed": guessed}
