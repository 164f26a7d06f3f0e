"""Grafts by row: every row of a batch uses the personal experts and gate of its client.

    y[b] = F(x[b]) + sum_p c_p sigmoid(G_p(x[b])) E_p(x[b])        p over the grafts of row b

A graft of differences adds E_p - E_s instead of E_p; E_s is the frozen expert that E_p started from. Whole and
frozen expert weights are not copied: one product computes all rows that share an expert. The gates and the low-rank
deltas are small; they are gathered by row and computed by batched products.
Shapes: B rows, S columns, D width, P pairs of a row and one of its experts, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from flexperts.moe.layout import ExpertWeights, LayerExperts
from flexperts.parts.grafts import Graft
from flexperts.parts.personal_expert import FullExpert, LowRankExpert
from flexperts.serving.engine.mixed_lora import by_row


class MixedGrafts:
    """The grafts of models that are in memory, by layer.

    Args:
        clients: Key -> experts module -> the grafts on it.
    """

    def __init__(self, clients: Mapping[str, Mapping[str, Sequence[Graft]]] | None = None) -> None:
        self._layers: list[_Layer] = []
        for key, layers in (clients or {}).items():
            self.put(key, layers)

    def put(self, key: str, layers: Mapping[str, Sequence[Graft]]) -> None:
        """Add a model's grafts: experts module -> the grafts on it, at least one."""
        known = {layer.experts.name: layer for layer in self._layers}
        for name, grafts in layers.items():
            if name not in known:
                self._layers.append(known.setdefault(name, _Layer(grafts[0].experts)))
            known[name].personal[key] = [p for graft in grafts for p in _personal(graft)]

    def keep(self, keys: Collection[str | None]) -> None:
        """Remove all grafts but these; no row has any until the next ``select``."""
        for layer in self._layers:
            layer.personal = {key: own for key, own in layer.personal.items() if key in keys}
            layer.select(())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the base add every row's personal experts inside the block."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.experts.add(layer.term).remove)
            yield

    def select(self, rows: Sequence[str | None]) -> None:
        """Set the grafts of each row of the next batches, by key; None means no grafts."""
        for layer in self._layers:
            layer.select(rows)


_Runs = tuple[tuple[ExpertWeights, int], ...]
"""Weights, and the number of adjacent pairs that use them."""


@dataclass(frozen=True)
class _Personal:
    """One personal expert of one client.

    Args:
        expert: The expert.
        gate_weight, gate_bias: The expert's gate, ``[D, 1]`` and ``[1, 1]``.
        scale: The constant factor of the expert's output.
        difference: Whether the frozen expert's output is subtracted.
    """

    expert: FullExpert | LowRankExpert
    gate_weight: Tensor
    gate_bias: Tensor
    scale: float
    difference: bool

    @property
    def shared_by(self) -> tuple[int, int]:
        """Numbers that are equal for experts with the same weights: a frozen expert's, and a whole copy's or 0."""
        return self.expert.index, 0 if isinstance(self.expert, LowRankExpert) else id(self.expert)

    @property
    def weights(self) -> ExpertWeights:
        """The tensors of the expert, not copied."""
        if isinstance(self.expert, LowRankExpert):
            return self.frozen
        return ExpertWeights(**{name: p.detach() for name, p in self.expert.named_parameters()})

    @property
    def frozen(self) -> ExpertWeights:
        """The tensors of the pretrained expert, not copied."""
        return self.expert.experts.expert(self.expert.index)

    @property
    def deltas(self) -> tuple[Tensor, ...]:
        """A and scaled B of the up projection, then of the down projection; empty for a whole expert."""
        e = self.expert
        if isinstance(e, FullExpert):
            return ()
        return e.up_lora_A, e.up_lora_B * e.scale, e.down_lora_A, e.down_lora_B * e.scale


@dataclass(frozen=True)
class _Selected:
    """The experts and gates that one layer computes for the rows of a batch.

    Args:
        rows: Row of each of the P pairs, ``[P]``, differences first; pairs that share weights are adjacent.
        runs: Weights, and the number of adjacent pairs that use them.
        frozen: The same of the frozen experts whose outputs are subtracted from the pairs of differences.
        gate_weight, gate_bias, scale: One per pair, ``[P, D, 1]``, ``[P, 1, 1]``, ``[P, 1, 1]``.
        deltas: Low-rank factors ``[P, in, r]``, ``[P, r, out]`` of up, then of down; empty for whole experts.
    """

    rows: Tensor
    runs: _Runs
    frozen: _Runs
    gate_weight: Tensor
    gate_bias: Tensor
    scale: Tensor
    deltas: tuple[Tensor, ...]


class _Layer:
    """One experts module with the personal experts on it, by key."""

    def __init__(self, experts: LayerExperts) -> None:
        self.experts = experts
        self.personal: dict[str, list[_Personal]] = {}
        self._batch = 0
        self._selected: _Selected | None = None

    def select(self, rows: Sequence[str | None]) -> None:
        """Order the pairs of rows and experts: differences first, and pairs which share weights adjacent."""
        pairs = [(row, p) for row, key in enumerate(rows) if key in self.personal for p in self.personal[key]]
        pairs.sort(key=lambda pair: (not pair[1].difference, pair[1].shared_by))
        self._batch, self._selected = len(rows), _gathered(pairs) if pairs else None

    def term(self, hidden: Tensor) -> Tensor | None:
        """Return what the rows' grafts add to the layer's output, in the shape of ``hidden [..., D]``."""
        if self._selected is None:
            return None
        rows = self._selected.rows
        tokens = by_row(hidden, self._batch)
        terms = self._terms(tokens[rows], self._selected)
        return terms.new_zeros(tokens.shape).index_add_(0, rows, terms).view(hidden.shape)

    def _terms(self, hidden: Tensor, selected: _Selected) -> Tensor:
        """Return every pair's gated expert output ``[P, S, D]`` for ``hidden [P, S, D]``."""
        output = self._outputs(hidden, selected.runs, selected.deltas)
        if differences := sum(count for _, count in selected.frozen):
            output[:differences] -= self._outputs(hidden[:differences], selected.frozen)
        gates = torch.baddbmm(selected.gate_bias, hidden, selected.gate_weight).sigmoid()
        return gates * selected.scale.to(gates.dtype) * output

    def _outputs(self, hidden: Tensor, runs: _Runs, deltas: Sequence[Tensor] = ()) -> Tensor:
        """Return every pair's expert output ``[P, S, D]``, with its low-rank deltas if there are any."""
        up = self._project(hidden, [(w.up, w.up_bias, n) for w, n in runs])
        inner = self.experts.activate(_plus(up, hidden, deltas[:2]))
        down = self._project(inner, [(w.down, w.down_bias, n) for w, n in runs])
        return self.experts.finish(_plus(down, inner, deltas[2:]))

    def _project(self, hidden: Tensor, runs: Sequence[tuple[Tensor, Tensor | None, int]]) -> Tensor:
        """Apply each run's matrix to its pairs, ``[P, S, in]`` to ``[P, S, out]``."""
        pieces = torch.split(hidden, [count for *_, count in runs])
        done = [
            self.experts.project(piece.flatten(0, 1), weight, bias).view(*piece.shape[:2], -1)
            for piece, (weight, bias, _) in zip(pieces, runs, strict=True)
        ]
        return done[0] if len(done) == 1 else torch.cat(done)


def _personal(graft: Graft) -> Iterator[_Personal]:
    """Yield a graft's experts, each with its gate in the layer's dtype."""
    weight, bias = (p.detach().to(graft.experts.dtype) for p in (graft.graft_gate_weight, graft.graft_gate_bias))
    for number, (expert, scale) in enumerate(zip(graft.personal, graft.scales, strict=True)):
        assert isinstance(expert, FullExpert | LowRankExpert)
        yield _Personal(expert, weight[number, :, None], bias[number].view(1, 1), scale, graft.difference)


def _gathered(pairs: Sequence[tuple[int, _Personal]]) -> _Selected:
    """Stack the small tensors of all pairs, and list the large ones, which adjacent pairs share."""
    rows, personal = zip(*pairs, strict=True)
    gate = personal[0].gate_weight
    runs = [list(run) for _, run in groupby(personal, key=lambda p: p.shared_by)]
    differences = [p for p in personal if p.difference]
    frozen = [list(run) for _, run in groupby(differences, key=lambda p: p.expert.index)]
    deltas = zip(*(p.deltas for p in personal), strict=True)
    return _Selected(
        rows=torch.tensor(rows, device=gate.device),
        runs=tuple((run[0].weights, len(run)) for run in runs),
        frozen=tuple((run[0].frozen, len(run)) for run in frozen),
        gate_weight=torch.stack([p.gate_weight for p in personal]),
        gate_bias=torch.stack([p.gate_bias for p in personal]),
        scale=gate.new_tensor([p.scale for p in personal]).view(-1, 1, 1),
        deltas=tuple(torch.stack(factors).to(gate.dtype).mT for factors in deltas),
    )


def _plus(output: Tensor, hidden: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return an output plus its pairs' low-rank deltas, if any."""
    if not factors:
        return output
    A, B = factors
    return output + torch.bmm(torch.bmm(hidden, A), B).to(output.dtype)
