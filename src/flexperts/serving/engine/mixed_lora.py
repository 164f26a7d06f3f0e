"""LoRA by row: every row of a batch uses the low-rank terms of its client, added by batched products.

    y[b] = W x[b] + B[b] (A[b] x[b])

Shapes: B rows, S columns, r the largest rank, M different adapters. W is the frozen layer, read once for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import ServingError
from flexperts.serving.engine.additions import FactorPairs


class MixedLora:
    """All adapters of a run, stacked by layer.

    Args:
        model: The base.
        adapters: Key -> attention layer -> low-rank terms.
        dtype: Type in which the terms are computed.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, Mapping[str, FactorPairs]], dtype: torch.dtype
    ) -> None:
        self._numbers = {key: number for number, key in enumerate(adapters)}
        targets = dict.fromkeys(target for layers in adapters.values() for target in layers)
        self._layers = [
            _Layer(model.get_submodule(target), [layers.get(target, []) for layers in adapters.values()], dtype)
            for target in targets
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the base add every row's terms inside the block."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.module.register_forward_hook(layer.add).remove)
            yield

    def select(self, rows: Sequence[str | None]) -> None:
        """Set the adapter of each row of the next batches, by key; None means no adapter."""
        numbers = [self._numbers[key] if key is not None else len(self._numbers) for key in rows]
        for layer in self._layers:
            layer.select(numbers)


class _Layer:
    """One attention layer's terms: A ``[M + 1, r, in]`` and B ``[M + 1, out, r]``; the last entries are zero."""

    def __init__(self, module: nn.Module, terms: Sequence[FactorPairs], dtype: torch.dtype) -> None:
        self.module = module
        joined = [(torch.cat([A for A, _ in t]), torch.cat([B for _, B in t], dim=1)) for t in terms if t]
        rank = max(A.shape[0] for A, _ in joined)
        (_, width), (height, _) = joined[0][0].shape, joined[0][1].shape
        self.A = joined[0][0].new_zeros(len(terms) + 1, rank, width, dtype=dtype)
        self.B = joined[0][1].new_zeros(len(terms) + 1, height, rank, dtype=dtype)
        filled = iter(joined)
        for number, term in enumerate(terms):
            if term:
                A, B = next(filled)
                self.A[number, : len(A)], self.B[number, :, : len(A)] = A, B
        self._batch = 0
        self._rows: tuple[Tensor, Tensor] | None = None

    def select(self, numbers: Sequence[int]) -> None:
        """Gather the rows' terms: one pair if all rows have the same adapter, nothing if no row has an adapter."""
        self._batch = len(numbers)
        different, none = set(numbers), len(self.A) - 1
        if different <= {none}:
            self._rows = None
        elif len(different) == 1:
            self._rows = self.A[numbers[0]], self.B[numbers[0]]
        else:
            index = torch.tensor(numbers, device=self.A.device)
            self._rows = self.A[index].transpose(1, 2), self.B[index].transpose(1, 2)

    def add(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's output ``[..., out]`` with every row's terms."""
        if self._rows is None:
            return output
        (A, B), hidden = self._rows, args[0].to(self.A.dtype)
        if A.dim() == 2:
            delta = F.linear(F.linear(hidden, A), B)
        else:
            delta = torch.bmm(torch.bmm(by_row(hidden, self._batch), A), B).view_as(output)
        return (output + delta).to(output.dtype)


def by_row(hidden: Tensor, rows: int) -> Tensor:
    """Return ``[..., D]`` as ``[B, T, D]``: models pass tokens on row after row, but in different shapes."""
    if hidden.numel() % (rows * hidden.shape[-1]):
        raise ServingError(
            f"a layer gets the shape {tuple(hidden.shape)} for {rows} rows",
            "rows can only be served together if every layer gets all of their tokens",
            "use `flexperts generate` for this model",
        )
    return hidden.reshape(rows, -1, hidden.shape[-1])
