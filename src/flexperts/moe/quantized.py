"""A frozen weight in 8 or 4 bits: a tensor with the shape and dtype of the original weight that stores its codes.

Shape, dtype and name are those of the full weight, so experts are found and read as usual. One expert,
``weight[i]``, is a view of its codes; several, ``weight[numbers]``, are copies of theirs. An operation that needs
values gets them for that operation only; autograd keeps the codes. Quantizing and dequantizing are bitsandbytes'
operations, in blocks of 64 values with one fp32 scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Scheme = Literal["int8", "nf4"]
BLOCK = 64
"""Number of values that share one scale."""
PACKED: dict[Scheme, int] = {"int8": 1, "nf4": 2}
"""Number of values in one byte of codes."""

_aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """A weight ``[..., R, C]`` stored as codes.

    Args:
        codes: uint8 ``[..., R * C / values per byte]``.
        scales: fp32 ``[..., R * C / 64]``.
        shape: The last two dimensions, as quantized: (R, C).
        dtype: The dtype of the original weight.
        scheme: How the weight is quantized.
        transposed: Whether the tensor is ``[..., C, R]`` instead.
    """

    codes: Tensor
    scales: Tensor

    def __new__(
        cls, codes: Tensor, scales: Tensor, shape: Any, dtype: Any, scheme: Scheme, transposed: bool = False
    ) -> Self:
        """Return the wrapper: a tensor without storage."""
        whole = torch.empty(*codes.shape[:-1], *shape, device="meta")
        seen = whole.transpose(-2, -1) if transposed else whole
        return torch.Tensor._make_wrapper_subclass(
            cls, seen.shape, strides=seen.stride(), dtype=dtype, device=codes.device
        )

    def __init__(
        self, codes: Tensor, scales: Tensor, shape: Any, dtype: Any, scheme: Scheme, transposed: bool = False
    ) -> None:
        self.codes, self.scales = codes, scales
        self.matrix, self.scheme, self.transposed = tuple(shape), scheme, transposed

    @classmethod
    def quantize(cls, weight: Tensor, scheme: Scheme) -> Self:
        """Quantize ``weight [..., R, C]``; R * C must be a multiple of 64."""
        ops, flat = _operations(), weight.contiguous().flatten(-2)
        if scheme == "nf4":
            codes, scales = ops.quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
        else:
            codes, scales = ops.quantize_blockwise(flat, _levels(weight.device), BLOCK)
        lead = weight.shape[:-2]
        return cls(codes.view(*lead, -1), scales.view(*lead, -1), weight.shape[-2:], weight.dtype, scheme)

    def dequantize(self) -> Tensor:
        """Return the values as an ordinary tensor."""
        ops, codes, scales = _operations(), self.codes.flatten(), self.scales.flatten()
        if self.scheme == "nf4":
            # One row per block: with shorter rows the CPU operation uses the wrong scales.
            values = ops.dequantize_4bit(codes, scales, BLOCK, "nf4", (len(scales), BLOCK), self.dtype)
        else:
            values = ops.dequantize_blockwise(codes, scales, _levels(self.device), BLOCK, self.dtype)
        values = values.view(*self.codes.shape[:-1], *self.matrix)
        seen: Tensor = values.mT if self.transposed else values
        return seen

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedTensor({tuple(self.shape)}, {self.scheme}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """Return the names of the inner tensors and the other attributes, for torch."""
        return ["codes", "scales"], (self.matrix, self.dtype, self.scheme, self.transposed)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], about: tuple[Any, ...], *_: Any) -> Self:
        """Rebuild the tensor from its inner tensors, for torch."""
        return cls(inner["codes"], inner["scales"], *about)

    # torch handles everything above autograd; below it, a few operations keep the codes.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the codes if it only moves or views them, else on the values."""
        kwargs = kwargs or {}
        if isinstance(args[0], cls) and (kept := args[0]._kept(func, args[1:], kwargs)) is not None:
            return kept
        values = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*values[0], **values[1])

    def _kept(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QuantizedTensor | None:
        """Return the result of an operation that keeps the codes, or None if ``func`` needs values."""
        if func in (_aten.detach.default, _aten.alias.default):
            return self._on_parts(lambda part: func(part))
        if func is _aten.clone.default:
            return self._on_parts(torch.clone)
        if func is _aten._to_copy.default and kwargs.get("dtype", self.dtype) == self.dtype:
            return self._on_parts(lambda part: part.to(kwargs.get("device"), copy=True))
        if func is _aten.select.int and self.codes.dim() > 1 and args[0] == 0:
            return self._on_parts(lambda part: part[args[1]])
        if func is _aten.index.Tensor and self.codes.dim() > 1 and len(args[0]) == 1:
            return self._on_parts(lambda part: part[args[0][0]])
        swaps = func is _aten.transpose.int and {d % self.dim() for d in args} == {self.dim() - 2, self.dim() - 1}
        if swaps or func is _aten.t.default:
            return self._on_parts(lambda part: part, transposed=not self.transposed)
        return None

    def _on_parts(self, change: Callable[[Tensor], Tensor], transposed: bool | None = None) -> QuantizedTensor:
        flipped = self.transposed if transposed is None else transposed
        return QuantizedTensor(
            change(self.codes), change(self.scales), self.matrix, self.dtype, self.scheme, flipped
        )


def quantized_bytes(shape: tuple[int, ...] | torch.Size, scheme: Scheme) -> int:
    """Return the bytes of a quantized weight of a shape."""
    return prod(shape) // PACKED[scheme] + 4 * (prod(shape) // BLOCK)


@cache
def _operations() -> Any:
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it warns of a missing kernel, not used here
    import bitsandbytes  # noqa: F401 - registers its operations with torch

    return torch.ops.bitsandbytes


@cache
def _levels(device: torch.device) -> Tensor:
    """Return the 255 evenly spaced levels of int8, with 0 twice."""
    from bitsandbytes.functional import create_linear_map

    levels: Tensor = create_linear_map(signed=True, total_bits=8).to(device)
    return levels
