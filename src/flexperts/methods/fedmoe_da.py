"""FedMoE-DA: each expert of each client is mixed with the experts that have the most similar router rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flexperts.communication.average import check_finite, holders_mean
from flexperts.communication.messages import DERIVED, Update
from flexperts.methods.kit.held_experts import EXPERTS, ROUTER, OwnParts, place_of
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.parameters.vector import Manifest, Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part, key
from flexperts.parts.router_deltas import RouterDeltas

_ROUTER_ROWS = f"{DERIVED}router_rows."


def _own(client: str, name: str) -> str:
    """Return the name in the server's memory of what a client sent last; its experts are mixed there."""
    return f"own.{client}.{name}"


def _mix(layer: str) -> str:
    """Return the name in the server's memory of a layer's A."""
    return f"mix.{layer}"


class FedMoEDA(OwnParts):
    """Every client has personal experts and routers; the server mixes similar experts across clients.

    Source: FedMoE-DA (arXiv 2411.02115), Eq. 8-11.
    Over all M = clients * N pairs a = (client i, expert e) of a layer: R_ab = cos(g_a, g_b), g_a being the router's
    row for e on client i. Each row of R keeps its P + 1 largest values, itself included; A_ab = softmax over the
    kept of R_ab / tau; E_a <- sum_b A_ab E_b. A is computed again every ``every`` rounds, first in round 1.
    Trained: attention LoRA, experts, routers. Sent: all of it; and the routers' effective rows (pretrained + delta)
    in the rounds that compute A. Aggregated: LoRA by FedAvg; experts by A. Stays: nothing, but a client's router is
    not sent to other clients. Inference: global LoRA with the client's own mixed experts and own router.
    Open choices: A is per layer, since rows of two layers are not in one space. The paper's clients fetch experts
    from each other; here the server relays them, so more bytes pass the server than the paper counts. Experts train
    by LoRA: A and B are mixed separately, so products are mixed only approximately, and the pretrained weights of
    an expert are not mixed; ``rank = "full"`` mixes whole experts, which is the equation itself. To make LoRA's
    factors comparable, all experts of a layer start from one A. With partial participation only participants'
    experts change; they mix with the last known experts and rows of all clients that took part in a round that
    computed A. Clients have equal weight in A; LoRA is weighted by rows. The global state is attention LoRA on the
    untouched base.
    """

    name = "fedmoe_da"
    one_global = False
    summary = "clients have personal experts and routers; the server mixes experts with similar router rows"
    source = "arXiv 2411.02115"
    sends = "attention LoRA, all routed experts' LoRA and routers"
    needs_experts = True

    class Options(OwnParts.Options):
        """Mixing of experts."""

        peers: int = Field(5, ge=0)
        """P, number of other experts with which each expert is mixed; 0 mixes nothing."""
        tau: float = Field(1.0, gt=0)
        """Temperature of the mixing weights."""
        every: int = Field(5, ge=1)
        """Number of rounds from one computation of the weights to the next."""
        rank: Annotated[int, Field(ge=1)] | Literal["full"] | None = None
        """LoRA rank of the experts, at scaling lora.alpha / rank, or "full" for all weights; default lora.rank."""

    options: Options

    # A client's model.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return parts that adapt every expert and every router."""
        every = {e.name: range(e.num_experts) for e in site.experts}
        experts = ExpertAdapters(
            site.experts,
            every,
            self.options.rank or site.config.lora.rank,
            site.config.lora.alpha,
            lambda layer, _expert: site.common_generator("experts", layer),
            dropout=site.config.lora.dropout,
        )
        return {"experts": experts, "router": RouterDeltas(site.lora.base, site.experts)}

    # A client's round.

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return all trained parameters and, in rounds that compute A, the routers' rows."""
        router = turn.parts["router"]
        assert isinstance(router, RouterDeltas)
        names = [e.name for e in turn.site.experts] if self._mixes_anew(turn.round) else []
        return {**turn.split.shared, **{f"{_ROUTER_ROWS}{key(n)}": router.weight(n).detach() for n in names}}

    # The server.

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the global LoRA with the client's own mixed experts and own router; at first, the common start."""
        shared = server.shared.tensors().items()
        return Payload.of({name: server.memory.get(_own(client, name), start) for name, start in shared})

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare all trained parameters and, in rounds that compute A, the routers' rows."""
        sent = server.shared.tensors()
        if self._mixes_anew(server.round + 1):
            sent |= {n.replace(ROUTER, _ROUTER_ROWS): t for n, t in sent.items() if n.startswith(ROUTER)}
        return Manifest.of(sent)

    def regroup(self, server: Server) -> None:
        """Forget the experts and routers of clients that have left, and mix without them from now on."""
        layers = _layers(server)
        names = [*server.shared.manifest.names, *(_ROUTER_ROWS + layer for layer in layers)]
        current = {_own(client, name) for client in server.clients for name in names} | set(map(_mix, layers))
        gone = server.memory.keys() - current
        for name in gone:
            del server.memory[name]
        if gone:
            self._compute_mix(server)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average LoRA; keep every participant's experts and router, and mix the experts."""
        shared, present = server.shared.tensors(), list[str]()

        def adapters() -> Iterator[Update]:
            for update in updates:
                check_finite(update)
                tensors = update.tensors()
                adapter = {n: tensors.pop(n) for n in list(tensors) if n.startswith(SHARED_PREFIX)}
                server.memory |= {_own(update.client, n): t.clone() for n, t in tensors.items()}
                present.append(update.client)
                yield replace(update, payload=Payload.of(adapter))

        before = {n: t for n, t in shared.items() if n.startswith(SHARED_PREFIX)}
        server.shared = Payload.of(shared | holders_mean(before, adapters()))
        if self._mixes_anew(server.round + 1):
            self._compute_mix(server)
        _mix_experts(server, present)

    def _mixes_anew(self, number: int) -> bool:
        return (number - 1) % self.options.every == 0

    def _compute_mix(self, server: Server) -> None:
        """Compute A of every layer anew; a layer whose known clients have all left has none."""
        for layer in _layers(server):
            server.memory.pop(_mix(layer), None)
            rows = [server.memory[_own(client, _ROUTER_ROWS + layer)] for client in _known(server, layer)]
            if rows:
                server.memory[_mix(layer)] = mixing(torch.cat(rows), self.options.peers, self.options.tau)


def mixing(rows: Tensor, peers: int, tau: float) -> Tensor:
    """Return A ``[M, M]`` in float64 from the router rows ``[M, D']`` of all (client, expert) pairs."""
    unit = F.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    # An expert must keep itself, also if other rows are equal to its row.
    first = cosines.clone().fill_diagonal_(torch.inf)
    kept = first.argsort(dim=1, descending=True, stable=True)[:, : peers + 1]
    scores = torch.full_like(cosines, -torch.inf).scatter(1, kept, cosines.gather(1, kept) / tau)
    return scores.softmax(1)


def _mix_experts(server: Server, present: Collection[str]) -> None:
    """Replace the participants' experts by their mixtures, all computed from the experts before mixing."""
    for layer in _layers(server):
        if not (clients := _known(server, layer)):
            continue
        for names in _expert_names(server, layer).values():
            pairs = [(client, _own(client, name)) for client in clients for name in names]
            before = [server.memory[own] for _, own in pairs]
            mixed = server.memory[_mix(layer)] @ torch.stack([t.flatten() for t in before]).double()
            for (client, own), old, new in zip(pairs, before, mixed, strict=True):
                if client in present:
                    server.memory[own] = new.float().view_as(old)


def _layers(server: Server) -> list[str]:
    return sorted(n.removeprefix(ROUTER) for n in server.shared.manifest.names if n.startswith(ROUTER))


def _known(server: Server, layer: str) -> list[str]:
    """Return the clients whose router rows the server has, sorted."""
    return [client for client in sorted(server.clients) if _own(client, _ROUTER_ROWS + layer) in server.memory]


def _expert_names(server: Server, layer: str) -> dict[str, list[str]]:
    """Return, for each tensor of an expert, its names for all experts of the layer, in the router's order."""
    names = [name for name in server.shared.manifest.names if name.startswith(f"{EXPERTS}{layer}.")]
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=place_of):
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found
