"""Baking: what grafts add to a layer, as further neurons of the layer's shared expert, so that no code is needed.

    graft          sum_p c_p sigmoid(G_p(x)) E_p(x)
    baked          s(x) D [act(gate(x)) * up(x)]          s: the shared expert's own gate, or 1

The new neurons are those of the personal experts. Their output weights D are fitted by least squares to what the
grafts add on the client's train rows, starting from the personal experts' own with the mean of their gates as a
factor. Where gates are constant, nothing is lost.

Shapes: T tokens, D hidden width, I intermediate width of an expert, W new neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.errors import ArtifactError, ConfigError
from flexperts.evaluation.scores import Scores
from flexperts.export.content import whole_expert
from flexperts.modeling.forward import hidden_states
from flexperts.moe.experts import find_experts
from flexperts.moe.fused import FusedExperts
from flexperts.moe.layout import LayerExperts
from flexperts.parts.grafts import Graft, Grafts

_ROWS, _BATCH = 64, 4
"""Most train rows that are read, and those of a batch."""
_RIDGE = 1e-3
"""Weight of the start in the least squares, relative to the neurons' mean square."""
_REMEDY = "use --form transformers without --bake"


@dataclass(frozen=True)
class BakingLoss:
    """What baking loses on a client's scored rows.

    Args:
        rows: Number of rows.
        nll: NLL of the personal model and of the baked one, in nats per token.
        rouge_l: Their ROUGE-L, in points of 100.
    """

    rows: int
    nll: tuple[float, float]
    rouge_l: tuple[float, float]

    @classmethod
    def between(cls, personal: Scores, baked: Scores) -> BakingLoss:
        """Compare the scores of two models; a score that is not finite is not-a-number."""
        both = [[math.nan if s is None else s for s in (one.nll, one.rouge_l)] for one in (personal, baked)]
        (before, points), (after, left) = both
        return cls(personal.rows, (before, after), (points, left))

    def __str__(self) -> str:
        (before, after), (points, baked) = self.nll, self.rouge_l
        return (
            f"baked: NLL {after:.3f}, with grafts {before:.3f}; ROUGE-L {baked:.1f}, with grafts {points:.1f} "
            f"({self.rows} rows)"
        )

    def check(self, most: float) -> None:
        """Refuse a loss of more nats per token than allowed."""
        lost = self.nll[1] - self.nll[0]
        if not lost <= most:
            rule = f"it loses {lost:.3f} nats per token on {self.rows} rows, more than --max-loss {most:g}"
            raise ArtifactError("the baked model", rule, f"{_REMEDY}, or allow more")


class Neurons(nn.Module):
    """Neurons beside those of a layer's shared expert; their output is 0 at first.

    Args:
        block: The layer's block, with its shared expert.
        up: Weights ``[2 W, D]`` of gate and up.
    """

    def __init__(self, block: nn.Module, up: Tensor) -> None:
        super().__init__()
        self.outside: list[Any] = [shared_of(block), getattr(block, "shared_expert_gate", None)]
        self.up = nn.Parameter(up.clone())
        self.down = nn.Parameter(up.new_zeros(up.shape[1], len(up) // 2))

    def active(self, hidden: Tensor) -> Tensor:
        """Return the neurons' values ``[T, W]`` for ``hidden [T, D]``."""
        gate, up = F.linear(hidden, self.up).chunk(2, -1)
        values: Tensor = self.outside[0].act_fn(gate) * up
        return values

    def factor(self, hidden: Tensor) -> Tensor:
        """Return the values ``[T, 1]`` of the shared expert's gate."""
        gate = self.outside[1]
        return torch.ones_like(hidden[:, :1]) if gate is None else torch.sigmoid(gate(hidden))

    @torch.no_grad()
    def write(self) -> None:
        """Make them a part of the shared expert's weights."""
        gate, up = self.up.chunk(2)
        for name, weight, side in (("gate_proj", gate, 0), ("up_proj", up, 0), ("down_proj", self.down, 1)):
            linear = getattr(self.outside[0], name)
            linear.weight = nn.Parameter(torch.cat([linear.weight, weight], side), requires_grad=False)
            linear.out_features, linear.in_features = linear.weight.shape


class Layer:
    """One layer: its grafts, and the neurons that take their place.

    Args:
        experts: The layer's experts.
        grafts: Its grafts, of all parts; maybe none.
        block: The layer's block.
        width: W, the same in all layers.
    """

    def __init__(self, experts: LayerExperts, grafts: Sequence[Graft], block: nn.Module, width: int) -> None:
        self.grafts = grafts
        nothing = partial(torch.zeros, device=experts.device)
        up, self.down, self.used = nothing(2, width, experts.width), nothing(experts.width, width), 0
        """The neurons' output weights, without the gates of grafts."""
        self.places: list[tuple[Graft, int, slice]] = []
        """A graft, the number of one of its gates, and the neurons behind that gate."""
        for graft, number, (gate, straight), down in chain.from_iterable(map(_experts_of, grafts)):
            place = slice(self.used, self.used + down.shape[1])
            up[0, place], up[1, place], self.down[:, place] = gate, straight, down
            self.places.append((graft, number, place))
            self.used = place.stop
        self.neurons = Neurons(block, up.flatten(0, 1))
        self.squares, self.products = nothing(width, width), nothing(width, experts.width)
        self.opening, self.open = nothing(width), nothing(())

    def watch(self, mask: Tensor) -> Iterator[RemovableHandle]:
        """Add up what ``solve`` needs, for one pass of the grafted model; ``mask [B * S]`` is true on tokens."""

        def seen(graft: Graft, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows = mask.to(output.device)
            hidden, added = args[0].flatten(0, -2)[rows], output.flatten(0, -2)[rows]
            factor = self.neurons.factor(hidden)
            values = factor * self.neurons.active(hidden)
            self.products += values.T @ added
            if graft is self.grafts[0]:
                self.squares += values.T @ values
                self.open += factor.sum()
            gates = graft.opening(hidden).sum(0)
            for owner, number, place in self.places:
                self.opening[place] += gates[number] if owner is graft else 0

        for graft in self.grafts:
            yield graft.register_forward_hook(seen)

    @torch.no_grad()
    def solve(self) -> None:
        """Fit the neurons' output weights."""
        used = self.used
        if not used:
            return
        start = (self.down * self.opening / self.open)[:, :used]  # the ratio of both gates' means
        squares, products = self.squares[:used, :used].double(), self.products[:used].double()
        weight = _RIDGE * squares.diagonal().mean()
        left = squares + weight * torch.eye(used, device=squares.device)
        self.neurons.down[:, :used] = torch.linalg.solve(left, products + weight * start.T.double()).T.float()


def bake(model: Any, grafts: Sequence[Grafts], examples: Sequence[Example], pad: int, seed: int) -> None:
    """Replace a model's grafts by neurons of its shared experts; its config gets their new width.

    Args:
        model: The base in float32, with everything but grafts merged.
        grafts: The grafts, not attached.
        examples: The client's encoded train rows.
        pad: The token for padding.
        seed: Seed of the order of rows.
    """
    found = find_experts(model)
    of = {e.name: [graft for part in grafts for graft in part if graft.experts.name == e.name] for e in found}
    width = max(sum(down.shape[1] for graft in its for *_, down in _experts_of(graft)) for its in of.values())
    wider = _wider(model, found[0], width)
    layers = [Layer(e, of[e.name], model.get_submodule(e.block), width) for e in found]
    stream = torch.Generator().manual_seed(seed)
    rows = [examples[i] for i in torch.randperm(len(examples), generator=stream)[:_ROWS].tolist()]
    with attached(grafts), torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            batch = pad_batch(rows[start : start + _BATCH], pad)
            with _held(h for layer in layers for h in layer.watch(batch.attention_mask.flatten().bool())):
                hidden_states(model, batch.input_ids, batch.attention_mask)
    for layer in layers:
        layer.solve()
        layer.neurons.write()
    for name, value in wider.items():
        setattr(model.config, name, value)


@contextmanager
def attached(grafts: Sequence[Grafts]) -> Iterator[None]:
    """Attach grafts inside the block."""
    for part in grafts:
        part.attach()
    try:
        yield
    finally:
        for part in grafts:
            part.detach()


def shared_of(block: nn.Module) -> Any:
    """Return a block's shared expert, or refuse the architecture."""
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    linears = [getattr(shared, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears):
        rule = "it has no shared expert that could take in what grafts add"
        raise ConfigError(f"--bake of a {type(block).__name__}", rule, _REMEDY)
    return shared


@contextmanager
def _held(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _experts_of(graft: Graft) -> Iterator[tuple[Graft, int, tuple[Tensor, ...], Tensor]]:
    """Yield the experts whose outputs a graft adds: the graft, the gate's number, gate and up ``[I, D]``, down."""
    for number, (expert, c, index) in enumerate(zip(graft.personal, graft.scales, graft.indices, strict=True)):
        terms = [(c, whole_expert(expert))]
        if graft.difference:
            terms.append((-c, dict(graft.experts.expert(index).items())))
        for factor, tensors in terms:
            yield graft, number, tensors["up"].detach().float().chunk(2), factor * tensors["down"].detach().float()


def _wider(model: Any, experts: LayerExperts, width: int) -> dict[str, int]:
    """Return the entries of the config that widen shared experts, or refuse the architecture."""
    shared, config = shared_of(model.get_submodule(experts.block)), model.config
    plain = isinstance(experts, FusedExperts) and experts.has_gate and not experts.is_transposed
    plain = plain and experts.expert(0).up_bias is None and _gates_alike(experts, shared)
    now, each = shared.gate_proj.out_features, getattr(config, "moe_intermediate_size", None)
    if plain and getattr(config, "shared_expert_intermediate_size", None) == now:
        return {"shared_expert_intermediate_size": now + width}
    if plain and each and getattr(config, "n_shared_experts", 0) * each == now and not width % each:
        return {"n_shared_experts": config.n_shared_experts + width // each}
    rule = "its config has no width of the shared expert, or its experts are of another kind"
    raise ConfigError(f"--bake of the type {config.model_type}", rule, _REMEDY)


def _gates_alike(experts: LayerExperts, shared: Any) -> bool:
    """Return whether routed and shared experts combine gate and up in the same way."""
    probe = torch.linspace(-3, 3, 16).view(2, 8)
    gate, up = probe.chunk(2, -1)
    return torch.allclose(experts.activate(probe), shared.act_fn(gate) * up)
