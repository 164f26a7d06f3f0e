"""HFedMoE: only the most valuable experts learn from a batch; an expert is averaged over clients that use it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from flexperts.communication.average import capped, check_finite, holders_mean
from flexperts.communication.messages import DERIVED, Update
from flexperts.methods.kit.held_experts import EXPERTS, ROUTER, place_of
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.moe.layout import LayerExperts
from flexperts.parameters.vector import Manifest, Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part, key
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.training.local import TrainResult

_USAGE, _SCORE, _LEARNED = (f"{DERIVED}{what}." for what in ("usage", "score", "learned"))
_SEEN = (_USAGE, _SCORE, _LEARNED)


class HFedMoEStyle(Method):
    """A budget of experts learns in each batch, and experts are averaged over the clients that use them.

    Source: HFedMoE (arXiv 2601.00583). G_e(x) is the router's weight of expert e for token x, 0 if not routed.
    Per batch: s_e = lam mean_x G_e + (1 - lam) max_x G_e;  I_e = s_e - beta mean_x G_e log(G_e / mean G_e).
    Forward: all routed experts; backward: the ``budget`` * N experts of the layer with the highest I.
    u_i(e) = mean of G_e over client i's tokens; S_i = {e : u_i(e) >= tau and e learned on i in this round}.
    E_e <- sum_{i: e in S_i} n_i E_{i,e} / sum n_i, unchanged if in no S_i;
    router <- sum_i alpha_i router_i, alpha_i ~ sum_{e in S_i} u_i(e) s_i(e), scaled to sum 1.
    Trained: attention LoRA, a LoRA on each expert, a delta on each router. Sent: all of it, trained or not, and
    three numbers per expert (u, mean s, batches in which it learned). Aggregated: LoRA by FedAvg; experts and
    routers as above, layer by layer. Stays: nothing. Inference: the global model.
    Open choices: the paper's alpha is divided by |S_global| and does not sum to 1, which would shrink the router;
    it is normalised here, and |S_global| cancels. Use above tau does not mean that an expert was trained, so
    trained batches are counted and required. A layer where no client has a weight keeps its router. A batch is one
    forward pass (``training.micro_batch_size`` rows); padding does not count. An expert without gradient passes
    none to the hidden states. Experts train by LoRA, not quantised. The source leaves tau, lam, beta open.
    The paper saves memory and time on a client; the bytes are those of all experts.
    """

    additive = False

    name = "hfedmoe_style"
    summary = "per batch only the most valuable experts learn; experts averaged over the clients that use them"
    source = "arXiv 2601.00583"
    sends = "attention LoRA, all routed experts' LoRA, routers and routing statistics of experts"
    needs_experts = True

    class Options(Method.Options):
        """Value of experts, and the clients that count for an expert."""

        budget: float = Field(0.5, gt=0, le=1)
        """Share of each layer's experts that carry gradient in a batch, at least one."""
        lam: float = Field(0.5, ge=0, le=1)
        """Weight of the mean in an expert's score; the maximum has 1 - lam."""
        beta: float = Field(0.1, ge=0)
        """Weight of the information term."""
        tau: float = Field(0.0, ge=0)
        """Lowest mean routing weight at which a client counts for an expert."""
        rank: int | None = Field(None, ge=1)
        """LoRA rank of the experts, at scaling lora.alpha / rank; without it, lora.rank."""

    options: Options

    # A client.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return parts that adapt every expert and every router."""
        every = {e.name: range(e.num_experts) for e in site.experts}
        lora, stream = site.config.lora, site.common_generator("experts")
        rank = self.options.rank or lora.rank
        experts = ExpertAdapters(site.experts, every, rank, lora.alpha, stream, dropout=lora.dropout)
        return {"experts": experts, "router": RouterDeltas(site.lora.base, site.experts)}

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all trained parameters: everything is shared."""
        return set(names)

    def train(self, turn: Turn) -> TrainResult:
        """Train with the budget, and add the experts' usage to the reply."""
        experts = turn.parts["experts"]
        assert isinstance(experts, ExpertAdapters)
        experts.gradient_for = budget = ExpertBudget(self.options.budget, self.options.lam, self.options.beta)
        with budget.watching(turn.model):
            result = turn.fit()
        for name, usage in budget.usage.items():
            turn.derived[f"{_USAGE}{key(name)}"] = (usage.weight / usage.tokens).float()
            turn.derived[f"{_SCORE}{key(name)}"] = (usage.score / usage.batches).float()
            turn.derived[f"{_LEARNED}{key(name)}"] = usage.learned.float()
        return result

    # The server.

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare all trained parameters, and three numbers per expert."""
        sent = server.shared.tensors()
        routers = {n.removeprefix(ROUTER): t for n, t in sent.items() if n.startswith(ROUTER)}
        return Manifest.of(sent | {f"{what}{layer}": t[:, 0] for what in _SEEN for layer, t in routers.items()})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average experts over the clients that count for them, and routers weighted by their experts' value."""
        current, routers = server.shared.tensors(), _Routers()
        mean = holders_mean(current, self._counting(updates, routers))
        server.shared = Payload.of({**mean, **routers.mean(server.max_share)})

    def _counting(self, updates: Iterable[Update], routers: _Routers) -> Iterator[Update]:
        """Yield each update with LoRA and the experts that count, and add its routers to ``routers``."""
        for update in updates:
            check_finite(update)
            tensors = update.tensors()
            members = counted(tensors, self.options.tau)
            for layer, mine in members.items():
                worth = tensors[f"{_USAGE}{layer}"].double() * tensors[f"{_SCORE}{layer}"].double()
                routers.add(f"{ROUTER}{layer}", tensors[f"{ROUTER}{layer}"], float(worth[sorted(mine)].sum()))
            yield replace(update, payload=Payload.of({n: t for n, t in tensors.items() if _counts(n, members)}))


def counted(tensors: Mapping[str, Tensor], tau: float) -> dict[str, set[int]]:
    """Return S_i by layer: the experts that a client used enough and also trained."""
    layers = [n.removeprefix(_USAGE) for n in tensors if n.startswith(_USAGE)]
    passed = {x: (tensors[f"{_USAGE}{x}"] >= tau) & (tensors[f"{_LEARNED}{x}"] > 0) for x in layers}
    return {layer: set(experts.nonzero().flatten().tolist()) for layer, experts in passed.items()}


def _counts(name: str, members: Mapping[str, set[int]]) -> bool:
    if name.startswith(EXPERTS):
        layer, expert = place_of(name)
        return expert in members[layer]
    return not name.startswith((ROUTER, *_SEEN))


@dataclass
class _Routers:
    """The routers of all clients with their weights; a share can be limited only once all weights are known."""

    routers: dict[str, list[Tensor]] = field(default_factory=dict)
    worth: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, router: Tensor, worth: float) -> None:
        """Add a client's router with its weight, of any scale."""
        if worth > 0:
            self.routers.setdefault(name, []).append(router.clone())
            self.worth.setdefault(name, []).append(worth)

    def mean(self, max_share: float) -> dict[str, Tensor]:
        """Return the weighted means, with weights scaled to sum 1; routers without any weight are left out."""
        return {name: self._mean(name, capped(self.worth[name], max_share)) for name in self.routers}

    def _mean(self, name: str, weights: list[float]) -> Tensor:
        weighted = (router.double() * weight for router, weight in zip(self.routers[name], weights, strict=True))
        return (reduce(torch.add, weighted) / sum(weights)).float()


@dataclass
class Usage:
    """Usage of a layer's experts in one round; all tensors are float64 ``[N]`` on the CPU.

    Args:
        weight: Sum over tokens of G_e(x), the router's weight.
        score: Sum over batches of s_e.
        learned: Number of batches in which the expert had a gradient.
        tokens: Number of tokens, without padding.
        batches: Number of batches.
    """

    weight: Tensor
    score: Tensor
    learned: Tensor
    tokens: int = 0
    batches: int = 0


def routing_matrix(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Return G ``[T, N]`` in float64 on the CPU: the router's weight of each expert for each token, or 0."""
    zeros = torch.zeros(len(index), num_experts, dtype=torch.float64)
    return zeros.scatter_add(1, index.cpu(), weights.detach().double().cpu())


def scores_of(routing: Tensor, lam: float) -> Tensor:
    """Return s_e ``[N]`` = lam mean_x G_e(x) + (1 - lam) max_x G_e(x)."""
    return lam * routing.mean(0) + (1 - lam) * routing.amax(0)


def values_of(routing: Tensor, lam: float, beta: float) -> Tensor:
    """Return I_e ``[N]`` = s_e - beta mean_x G_e(x) log(G_e(x) / mean G_e), with 0 log 0 = 0."""
    mean = routing.mean(0)
    ratio = torch.where(routing > 0, routing / mean.clamp_min(1e-300), torch.ones_like(routing))
    return scores_of(routing, lam) - beta * (routing * ratio.log()).mean(0)


@dataclass
class ExpertBudget:
    """A choice of learning experts per layer and batch, with usage counts; for ``ExpertAdapters.gradient_for``.

    Args:
        budget: Share of a layer's experts that get a gradient.
        lam, beta: As in ``scores_of`` and ``values_of``.
        usage: The counts so far, by experts module.
    """

    budget: float
    lam: float
    beta: float
    usage: dict[str, Usage] = field(default_factory=dict)
    _mask: Tensor | None = None
    _chosen: dict[str, set[int]] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch forward passes inside the block: when each begins, and which of its tokens are padding."""
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def __call__(self, experts: LayerExperts, index: Tensor, weights: Tensor) -> Collection[int]:
        """Return the experts that learn; the second call, from gradient checkpointing, returns the same ones."""
        if experts.name not in self._chosen:
            # Without gradient: checkpointing requires that the first and second call save equally many tensors.
            tokens = slice(None) if self._mask is None else self._mask.to(index.device)
            self._chosen[experts.name] = self._choose(experts, index[tokens], weights[tokens])
        return self._chosen[experts.name]

    def _begin(self, _module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask, self._chosen = None if mask is None else mask.flatten().bool(), {}

    def _choose(self, experts: LayerExperts, index: Tensor, weights: Tensor) -> set[int]:
        routing = routing_matrix(index, weights, experts.num_experts)
        count = max(1, round(self.budget * experts.num_experts))
        value = values_of(routing, self.lam, self.beta)
        chosen = set(value.argsort(descending=True, stable=True)[:count].tolist())
        self._note(experts, routing, chosen)
        return chosen

    def _note(self, experts: LayerExperts, routing: Tensor, chosen: set[int]) -> None:
        zeros = torch.zeros(3, experts.num_experts, dtype=torch.float64)
        usage = self.usage.setdefault(experts.name, Usage(*zeros))
        usage.weight += routing.sum(0)
        usage.score += scores_of(routing, self.lam)
        # A chosen expert without tokens has learned nothing.
        reached = [e for e in chosen if routing[:, e].any()]
        usage.learned[reached] += 1
        usage.tokens += len(routing)
        usage.batches += 1
