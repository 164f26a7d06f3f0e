"""RMSNorm of bf16 values on a CPU, in fewer passes over memory than written out in torch.

Shapes: D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexperts.moe.layout import num_arguments, own_parameters

_FEW = 2**17
"""Values up to which calls cost more than memory where nothing is trained, as in a step of generation."""


class FusedNorms:
    """Computes a model's frozen RMSNorms with torch's fused kernels, until ``remove``.

    A norm is recognised by what it computes, x / sqrt(mean(x^2) + eps) * weight, not by its name. On other devices,
    in fp32 and under torch.compile it runs unchanged.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = dict(_found(model))
        for norm, eps in self._norms.items():
            norm.forward = partial(_forward, norm, eps)

    def remove(self) -> None:
        """Run the norms unchanged again."""
        for norm in self._norms:
            del norm.forward


def _found(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """Yield the frozen bf16 RMSNorms on a CPU, with their eps."""
    for norm in model.modules():
        own, eps = own_parameters(norm), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = own.get("weight")
        alone = len(own) == 1 and not list(norm.children()) and "forward" not in vars(norm)
        if not alone or weight is None or weight.dim() != 1 or not weight.is_cpu or weight.dtype != torch.bfloat16:
            continue
        if isinstance(eps, float) and num_arguments(norm) == 1 and _is_rms_norm(norm, weight, eps):
            yield norm, eps


@torch.no_grad()
def _is_rms_norm(norm: nn.Module, weight: Tensor, eps: float) -> bool:
    """Compare on two rows, of which the second is so small that eps matters."""
    rows = torch.linspace(-3, 2, 2 * len(weight)).sin().view(2, -1) * torch.tensor([[1.0], [eps**0.5]])
    x = rows.bfloat16()
    ours: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return torch.allclose(norm(x).float(), ours.float(), rtol=2**-7, atol=0)


def _forward(norm: Any, eps: float, x: Tensor) -> Tensor:
    few = 0 if torch.is_grad_enabled() else _FEW
    plain = x.dtype != torch.bfloat16 or norm.weight.requires_grad or torch.compiler.is_compiling()
    if plain or x.numel() <= few:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    return _RMSNorm.apply(x, norm.weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """The kernels of two other norms, given the statistics of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, len(weight))
        square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square_().div_(len(weight))
        # A batch norm whose channels are the rows divides each row by its own deviation.
        zero = torch.zeros_like(square)
        output = torch.batch_norm(rows[None], None, None, zero, square, False, 0.0, eps, False)
        ctx.save_for_backward(rows, weight, square.add_(eps).rsqrt_().unsqueeze(1))
        return output.view(x.shape).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, scale = ctx.saved_tensors
        grads = grad.reshape(rows.shape)
        # A layer norm's gradient at a mean of zero also subtracts the mean of grad * weight, which is added again.
        to_rows: Tensor
        to_rows, *_ = torch.ops.aten.native_layer_norm_backward(
            grads, rows, [len(weight)], torch.zeros_like(scale), scale, weight.float(), None, [True, False, False]
        )
        to_rows.add_((grads @ weight).unsqueeze(1) * scale.div(len(weight)))
        return to_rows.view(grad.shape), None, None
