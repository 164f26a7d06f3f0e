"""LoRA layers that read one tensor, such as q, k and v, computed together while a CPU trains under autocast.

PEFT computes each of them by itself: casts of the input, a product with A, a scaling and a sum. Here one product
with all A's serves the layers, one more serves their gradients, and sums are parts of products. Without gradients
the few rows of a step of generation would cost more this way, so PEFT computes them.

Shapes: T tokens, D input width, O a layer's output width, r rank, R the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class JoinedLora:
    """The adapted layers of one module, computed together in a call that gives all of them the same tensor.

    Args:
        parent: The module.
        layers: PEFT's layers in it, with inputs of one width.
    """

    def __init__(self, parent: nn.Module, layers: Sequence[Linear]) -> None:
        self._layers = dict(enumerate(layers))
        self._together = set(self._layers)
        self._open = False
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        for number, layer in self._layers.items():
            layer.forward = partial(self._forward, number, layer.forward)
        self._parent, self._before = parent, vars(parent).get("forward")
        parent.forward = partial(self._call, parent.forward)

    def remove(self) -> None:
        """Let PEFT compute the layers again; of two objects on one module, the later one is removed first."""
        del self._parent.forward
        if self._before is not None:
            self._parent.forward = self._before
        for layer in self._layers.values():
            del layer.forward

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self._open = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._together -= self._ready.keys()  # what is left was computed with the input of another layer
            self._open, self._input, self._ready = False, None, {}

    def _forward(self, number: int, peft: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x is self._input and number in self._ready:
            return self._ready.pop(number)
        trains = torch.is_grad_enabled() and x.is_cpu and torch.is_autocast_enabled("cpu")
        if not self._open or not trains or args or kwargs:
            return peft(x, *args, **kwargs)  # type: ignore[no-any-return]
        joint = number in self._together and not self._ready
        asked = sorted(self._together) if joint else [number]
        terms = [own for n in asked if (own := _terms(self._layers[n])) is not None]
        if torch.compiler.is_compiling() or len(terms) < len(asked):
            return peft(x)  # type: ignore[no-any-return]
        outputs: tuple[Tensor, ...] = _Products.apply(  # type: ignore[no-untyped-call]
            x,
            torch.get_autocast_dtype("cpu"),
            [(layer.weight, layer.bias) for layer in (self._layers[n].get_base_layer() for n in asked)],
            [[scale for *_, scale in own] for own in terms],
            *(factor for own in terms for *pair, _ in own for factor in pair),
        )
        computed = dict(zip(asked, outputs, strict=True))
        if len(computed) > 1:
            self._input, self._ready = x, computed
        return computed.pop(number)


def _terms(layer: Linear) -> list[tuple[Tensor, Tensor, float]] | None:
    """Return A ``[r, D]``, B ``[O, r]`` and scale of a layer's adapters in use, or None where PEFT does more."""
    base = layer.get_base_layer()
    used = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [part for name in used for part in (layer.lora_A[name], layer.lora_B[name])]
    plain = (
        used
        and not layer.merged
        and "forward" not in vars(base)  # accelerate replaces it where weights are elsewhere
        and not base.weight.requires_grad
        and all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (base, *parts))
        and not any(name in layer.lora_variant for name in used)
        and not any(isinstance(drop := layer.lora_dropout[name], nn.Dropout) and drop.training for name in used)
    )
    if not plain:
        return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in used]


class _Products(torch.autograd.Function):
    """y_i = W_i x + b_i + sum_j s_ij B_ij (A_ij x), where only x, A and B get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        frozen: list[tuple[Tensor, Tensor | None]],
        scales: list[list[float]],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weights = [W.to(dtype) for W, _ in frozen]
        every_A = torch.cat(factors[::2]).to(dtype)
        scaled = [s * B for s, B in zip((s for own in scales for s in own), factors[1::2], strict=True)]
        every_B = [B.to(dtype) for B in scaled]
        low = F.linear(rows, every_A)
        ctx.counts = [len(own) for own in scales]
        ctx.ranks = [A.shape[0] for A in factors[::2]]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.scales = [s for own in scales for s in own]
        ctx.save_for_backward(rows, low, every_A, *weights, *every_B)
        terms = zip(torch.split(low, ctx.ranks, 1), every_B, strict=True)
        outputs = []
        for weight, (_, bias), count in zip(weights, frozen, ctx.counts, strict=True):
            output = F.linear(rows, weight, None if bias is None else bias.to(dtype))
            for _ in range(count):
                part, B = next(terms)
                torch.addmm(output, part, B.T, out=output)
            outputs.append(output.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, low, every_A, *others = ctx.saved_tensors
        weights, every_B = others[: len(ctx.counts)], iter(others[len(ctx.counts) :])
        lows, scales = iter(torch.split(low, ctx.ranks, 1)), iter(ctx.scales)
        wants_x = ctx.needs_input_grad[0]
        to_x: Tensor | None = None
        to_low, to_B = [], []
        for grad, weight, count in zip(
            (g.reshape(-1, g.shape[-1]) for g in grads), weights, ctx.counts, strict=True
        ):
            if wants_x:
                to_x = grad @ weight if to_x is None else torch.addmm(to_x, grad, weight, out=to_x)
            for _ in range(count):
                to_low.append(grad @ next(every_B))
                to_B.append((grad.T @ next(lows)).float().mul_(next(scales)))
        to_lows = torch.cat(to_low, 1)
        wants_A = any(ctx.needs_input_grad[4::2])
        to_A = (to_lows.T @ rows).float().split(ctx.ranks) if wants_A else [None] * len(ctx.ranks)
        if to_x is not None:
            to_x = torch.addmm(to_x, to_lows, every_A, out=to_x).view(ctx.shape).to(ctx.dtype)
        return to_x, None, None, None, *(g for pair in zip(to_A, to_B, strict=True) for g in pair)
