"""LoRA by row: every row of a batch uses the low-rank terms of its client, added by batched products.

    y[b] = W x[b] + B[b] (A[b] x[b])

Shapes: B rows, r the largest rank of a batch. W is the frozen layer, read once for all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import ServingError
from flexperts.serving.engine.additions import FactorPairs


class MixedLora:
    """The adapters of models that are in memory, by layer.

    Args:
        model: The base.
        dtype: Type in which the terms are computed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._layers: dict[str, _Layer] = {}

    def put(self, key: str, layers: Mapping[str, FactorPairs]) -> None:
        """Add an adapter: attention layer -> its low-rank terms, at least one."""
        for target, terms in layers.items():
            if target not in self._layers:
                self._layers[target] = _Layer(self._model.get_submodule(target))
            A, B = torch.cat([A for A, _ in terms]), torch.cat([B for _, B in terms], dim=1)
            self._layers[target].terms[key] = A.to(self._dtype), B.to(self._dtype)

    def keep(self, keys: Collection[str | None]) -> None:
        """Remove all adapters but these; no row has one until the next ``select``."""
        for layer in self._layers.values():
            layer.terms = {key: pair for key, pair in layer.terms.items() if key in keys}
            layer.select(())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the base add every row's terms inside the block."""
        with ExitStack() as stack:
            for layer in self._layers.values():
                stack.callback(layer.module.register_forward_hook(layer.add).remove)
            yield

    def select(self, rows: Sequence[str | None]) -> None:
        """Set the adapter of each row of the next batches, by key; None means no adapter."""
        for layer in self._layers.values():
            layer.select(rows)


class _Layer:
    """One attention layer's terms: key -> A ``[r, in]`` and B ``[out, r]``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.terms: dict[str, tuple[Tensor, Tensor]] = {}
        self._batch = 0
        self._rows: tuple[Tensor, Tensor] | None = None

    def select(self, keys: Sequence[str | None]) -> None:
        """Gather the rows' terms: one pair if all rows have the same adapter, nothing if no row has an adapter."""
        self._batch = len(keys)
        own = {key: self.terms[key] for key in keys if key in self.terms}
        if not own:
            self._rows = None
        elif len(set(keys)) == 1:
            [self._rows] = own.values()
        else:
            (A, B), rank = next(iter(own.values())), max(len(A) for A, _ in own.values())
            inner = A.new_zeros(len(keys), rank, A.shape[1])
            outer = B.new_zeros(len(keys), B.shape[0], rank)
            for row, key in enumerate(keys):
                if key in own:
                    A, B = own[key]
                    inner[row, : len(A)], outer[row, :, : len(A)] = A, B
            self._rows = inner.transpose(1, 2), outer.transpose(1, 2)

    def add(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's output ``[..., out]`` with every row's terms."""
        if self._rows is None:
            return output
        A, B = self._rows
        hidden = args[0].to(A.dtype)
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
