"""Sums for the selection of experts: how well each expert reproduces a layer's routed output on a client's tokens.

    s* = argmin_s  sum_x || F(x) - E_s(x) ||^2        F(x) = sum_{j in TopK} g_j(x) E_j(x)

With one expert kept, its re-normalised router weight is 1. All layers are scored in ONE forward pass: hooks add up
inner products and store no output. Every rule in ``rules`` works on these sums alone.
Shapes: T tokens, D width, N experts, K experts per token.
Source: FLEx (arXiv 2506.00965), after the layer-wise criterion of Lu et al., ACL 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import torch
from torch import Generator, Tensor

from flexperts.config.model import GraftConfig
from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import GraftError
from flexperts.modeling.forward import Precision, autocast, hidden_states
from flexperts.moe.layout import LayerExperts, Note

Batch = Mapping[str, Tensor]
STACK = 2**26
"""Most values of all experts' up projections and outputs in memory at once, if pairs need them all."""
TOKENS = 512
"""Tokens per chunk: enough for efficient matrix products, few enough that one expert's outputs are small."""


@dataclass
class LayerScores:
    """Sums of one experts module over the calibration tokens x; all tensors are float64 on the CPU.

    Args:
        name: Experts module name.
        gram: ``[N, N]``, sum of E_s(x) . E_t(x); without ``pairs``, zero outside the diagonal.
        cross: ``[N]``, sum of F(x) . E_s(x).
        energy: Sum of ||F(x)||^2.
        counts: ``[N]``, tokens that the router sent to each expert.
        weights: ``[N]``, sum of each expert's router weights.
        tokens: Calibration tokens that were scored.
        pairs: Whether experts are also compared with each other, which subsets of several need, or with F alone.
    """

    name: str
    gram: Tensor
    cross: Tensor
    energy: float
    counts: Tensor
    weights: Tensor
    tokens: int
    pairs: bool = True

    @classmethod
    def empty(cls, name: str, num_experts: int, *, pairs: bool = True) -> Self:
        """Return the sums before any token."""
        gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        cross, counts, weights = torch.zeros(3, num_experts, dtype=torch.float64)
        return cls(name, gram, cross, 0.0, counts, weights, 0, pairs)

    @property
    def errors(self) -> Tensor:
        """``[N]`` float64, sum over tokens of ||F - E_s||^2."""
        return (self.energy - 2 * self.cross + self.gram.diagonal()).clamp_min(0)

    @property
    def relative(self) -> Tensor:
        """``[N]`` errors divided by the routed output's energy: 1 is as bad as predicting zero."""
        return self.errors / max(self.energy, 1e-30)

    def best(self, k: int) -> tuple[int, ...]:
        """Return the k experts with the smallest error, best first."""
        self.check_count(k)
        return tuple(int(i) for i in self.errors.argsort(stable=True)[:k])

    def check_count(self, k: int) -> None:
        """Refuse to choose k of the N experts if that is not possible."""
        if not 1 <= k <= len(self.cross):
            rule = f"{self.name} has {len(self.cross)} experts"
            raise GraftError(f"graft.experts = {k}", rule, f"use a number from 1 to {len(self.cross)}")

    def add(self, sums: Sequence[Tensor], tokens: int) -> None:
        """Add ``products`` of so many tokens."""
        gram, cross, energy = (each.cpu() for each in sums)
        self.gram += gram
        self.cross += cross
        self.energy += energy.item()
        self.tokens += tokens

    def add_routing(self, index: Tensor, weight: Tensor) -> None:
        """Add the router's choices for tokens: ``index`` and ``weight``, both ``[T, K]``."""
        # On the CPU, because CUDA adds up a bin in no fixed order.
        chosen, given, N = index.flatten().cpu(), weight.flatten().double().cpu(), len(self.cross)
        self.counts += torch.bincount(chosen, minlength=N)[:N]
        self.weights += torch.bincount(chosen, given, minlength=N)[:N]


def products(target: Tensor, outputs: Iterable[Tensor], *, pairs: bool) -> list[Tensor]:
    """Return tokens' inner products, in fp64: gram ``[N, N]``, of which ``pairs`` needs all, cross ``[N]``, energy.

    A single expert's error is far from zero, so fp32 is enough within a call. The linear system of pairs can be
    nearly singular, and is computed in fp64.

    Args:
        target: F, ``[T, D]``.
        outputs: The outputs of all experts in order, in chunks of n experts: ``[n, T, D]``.
        pairs: Whether products of two different experts are needed.
    """
    found = _all_products(target, outputs) if pairs else _single_products(target, outputs)
    return [product.double() for product in found]


def _single_products(target: Tensor, outputs: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return gram, its diagonal alone, cross and energy."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    whole, squares, cross = target.to(dtype).flatten(), [], []
    for some in outputs:
        rows = some.flatten(1)
        squares.append(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square())
        cross.append((rows * whole).sum(1))  # no matrix product: autocast would round that
    return torch.cat(squares).diag(), torch.cat(cross), whole.dot(whole)


def _all_products(target: Tensor, outputs: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return gram, cross and energy in fp64."""
    stacked = torch.cat([*outputs, target[None]]).double().flatten(1)
    products = stacked @ stacked.T
    return products[:-1, :-1], products[:-1, -1], products[-1, -1]


@dataclass
class _Noted:
    """What one layer's calls have added up to, on the device of its experts: a card is not waited for at each call.

    Args:
        layer: Receives it in the end.
        products: Gram, cross and energy; none before the first call.
        routing: The router's choices ``[T, K]`` and their weights, of every call.
        tokens: Calibration tokens.
    """

    layer: LayerScores
    products: list[Tensor] = field(default_factory=list)
    routing: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: int = 0

    def add(self, products: list[Tensor], tokens: int) -> None:
        if self.products:
            products = [a + b for a, b in zip(self.products, products, strict=True)]
        self.products = products
        self.tokens += tokens

    def read(self) -> LayerScores:
        """Return the layer's sums on the CPU."""
        if self.routing:
            self.layer.add(self.products, self.tokens)
            sizes = [len(index) for index, _ in self.routing]
            whole = (torch.split(torch.cat(choices).cpu(), sizes) for choices in zip(*self.routing, strict=True))
            for index, weight in zip(*whole, strict=True):
                self.layer.add_routing(index, weight)
        return self.layer


@dataclass
class Probe:
    """Collector of the sums at chosen positions of each batch, while the experts are watched.

    Args:
        pairs: See ``LayerScores``.
        positions: The flat positions to score in the next batch.
    """

    pairs: bool
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _noted: list[_Noted] = field(default_factory=list)

    def note(self, experts: LayerExperts) -> Note:
        """Return a function that scores a call of ``experts``."""
        noted = _Noted(LayerScores.empty(experts.name, experts.num_experts, pairs=self.pairs))
        self._noted.append(noted)
        values = experts.num_experts * (experts.width + experts.expert(0).up.numel() // experts.width)
        chunk = min(TOKENS, max(1, STACK // values)) if self.pairs else TOKENS

        def score(*call: Tensor) -> None:
            self.positions = self.positions.to(call[0].device)
            hidden, index, weight, target = (t.index_select(0, self.positions) for t in call)
            noted.routing.append((index, weight))
            for tokens, part in zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True):
                noted.add(products(part, experts.run_all(tokens), pairs=self.pairs), len(tokens))

        return score

    def scores(self) -> list[LayerScores]:
        """Return the sums of all layers, in the order of the calls of ``note``."""
        return [noted.read() for noted in self._noted]


@torch.no_grad()
def reconstruction_scores(
    forward: Callable[[Batch], object],
    experts: Sequence[LayerExperts],
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    generator: Generator,
    pairs: bool = False,
) -> list[LayerScores]:
    """Score every expert of every layer in one pass over the calibration batches.

    Args:
        forward: Runs the base on one batch; called once per batch.
        experts: The modules to score.
        batches: Dicts with at least ``attention_mask [B, S]``; padding is never scored.
        max_tokens: Token budget per layer, spread evenly over the batches.
        generator: Stream that picks the tokens if there are more than the budget.
        pairs: Whether to compare the experts with each other too, for rules that choose several together.

    Raises:
        GraftError: There is no calibration token.
    """
    batches = list(batches)
    total = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if not total:
        raise GraftError("calibration data", "it has no tokens", "give the client at least one train row")
    probe = Probe(pairs)
    handles = [handle for e in experts for handle in e.watch(probe.note(e))]
    try:
        for batch in batches:
            probe.positions = _sample(batch["attention_mask"], max_tokens / total, generator)
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return probe.scores()


def _sample(mask: Tensor, rate: float, generator: Generator) -> Tensor:
    """Return sorted flat positions of unmasked tokens, a random share ``rate`` of them (at most all)."""
    positions = mask.reshape(-1).nonzero().squeeze(-1)
    count = min(len(positions), max(1, round(rate * len(positions))))
    order = torch.randperm(len(positions), generator=generator)[:count].to(positions.device)
    return positions[order].sort().values


@dataclass(frozen=True)
class CalibrationSettings:
    """The tokens that the selection reads.

    Args:
        graft: The recipe's section; where it takes several experts, they are also compared with each other.
        batch_size: Rows per forward pass.
        pad_token_id: Token that pads short rows; it is never scored.
        precision: The precision of training.
    """

    graft: GraftConfig
    batch_size: int
    pad_token_id: int
    precision: Precision


def score_experts(
    model: Any,
    experts: Sequence[LayerExperts],
    examples: Sequence[Example],
    settings: CalibrationSettings,
    generator: Generator,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerScores]:
    """Score every expert of every layer on a client's rows.

    Args:
        model: The base, without grafts and adapters.
        experts: Its experts modules.
        examples: The client's encoded train rows.
        settings: The tokens to read.
        generator: Stream that draws rows and tokens.
        on_batch: Called after each batch: how many are done, of how many.
    """
    batches, graft = calibration_batches(examples, settings, generator), settings.graft
    device, tokens = next(model.parameters()).device, graft.calibration_tokens
    done = count(1)

    def forward(batch: Batch) -> None:
        hidden_states(model, **batch)
        on_batch(next(done), len(batches))

    with autocast(device, settings.precision):
        return reconstruction_scores(
            forward, experts, batches, max_tokens=tokens, generator=generator, pairs=graft.experts > 1
        )


def calibration_batches(
    examples: Sequence[Example], settings: CalibrationSettings, generator: Generator
) -> list[Batch]:
    """Return batches of a client's rows, drawn at random and sorted by length."""
    order = torch.randperm(len(examples), generator=generator).tolist()[: settings.graft.calibration_rows]
    chosen = sorted((examples[i] for i in order), key=lambda example: len(example.input_ids))
    padded = [
        pad_batch(chosen[start : start + settings.batch_size], settings.pad_token_id)
        for start in range(0, len(chosen), settings.batch_size)
    ]
    return [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in padded]
