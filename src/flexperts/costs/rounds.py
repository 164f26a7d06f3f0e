"""The rounds of a run without data and weights: the method's code, run on shapes, decides what every client sends.

Clients' rows are unknown, so calibration scores are placeholders in which all experts are equal. Which experts a
method then chooses is arbitrary; how many it chooses is the same as in a run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from flexperts.client.model import ClientModel
from flexperts.communication.compression import packed_bytes
from flexperts.communication.messages import Update
from flexperts.communication.traffic import group_bytes
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site
from flexperts.parameters.vector import Manifest, Payload, sizes_only
from flexperts.selection.selection import LayerScores

Groups = dict[str, int]
"""Tensor group -> bytes."""


@dataclass(frozen=True)
class PlannedSite(Site):
    """A client's site on a base without weights.

    Args:
        top_k: K, experts per token.
    """

    top_k: int = 1

    def score_experts(self) -> list[LayerScores]:
        """Return scores of one token per expert, equal for all experts."""
        return [_alike(e.name, e.num_experts, self.top_k) for e in self.experts]


@dataclass(frozen=True)
class RoundBytes:
    """The payloads of one round, in bytes.

    Args:
        number: The round, from 1.
        uplink: Participating client -> bytes that it sends, by tensor group, before packing.
        downlink: Participating client -> bytes that it receives, by tensor group.
        packed: Participating client -> all bytes that it sends, packed as the recipe says.
    """

    number: int
    uplink: dict[str, Groups]
    downlink: dict[str, Groups]
    packed: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all clients in both directions."""
        return sum(self.packed.values()) + sum(sum(groups.values()) for groups in self.downlink.values())


def planned_sites(model: ClientModel, clients: Collection[str], top_k: int) -> dict[str, PlannedSite]:
    """Return every client's site by name, as it is after all clients have joined."""
    sites = {name: _prepared(model, name, top_k) for name in sorted(clients)}
    agreement = model.method.agree(_reports(model, sites))
    return {name: replace(site, agreement=agreement) for name, site in sites.items()}


def planned_rounds(model: ClientModel, sites: dict[str, PlannedSite]) -> list[RoundBytes]:
    """Return the recipe's rounds and the method's extra ones; with partial participation, the first clients."""
    method, config = model.method, model.config
    server = _server(model, sites)
    drawn = sorted(sites)[: config.federation.drawn(len(sites))]
    rounds = []
    for number in range(1, config.federation.rounds + method.extra_rounds(config.federation.rounds) + 1):
        present = sorted(method.participants(server, drawn))
        down = {name: method.broadcast(server, name).manifest for name in present}
        up = {name: method.uplink(server, name) for name in present}
        packed = {name: packed_bytes(manifest.size, config.compression) for name, manifest in up.items()}
        rounds.append(RoundBytes(number, _by_group(up), _by_group(down), packed))
        if method.sends_back:
            method.aggregate(server, [_update(name, manifest) for name, manifest in up.items()])
        server.round = number
    return rounds


def _prepared(model: ClientModel, name: str, top_k: int) -> PlannedSite:
    site = PlannedSite(**vars(model.site(name, [], Prepared())), top_k=top_k)
    return replace(site, prepared=model.method.prepare(site))


def _reports(model: ClientModel, sites: dict[str, PlannedSite]) -> dict[str, Any]:
    return {name: model.method.report(site) for name, site in sites.items()}


def _server(model: ClientModel, sites: dict[str, PlannedSite]) -> Server:
    """Return the server's state before round 1."""
    first = next(iter(sites.values()))
    with model.lend(model.method.initial_site(first), {}) as (split, _):
        shared = _shapes(Manifest.of(model.method.initial(split)))
    server = Server(
        shared, dict.fromkeys(sites, 1), _reports(model, sites), first.agreement, seed=model.config.seed
    )
    model.method.start(server)
    return server


def _update(client: str, manifest: Manifest) -> Update:
    return Update(client, _shapes(manifest), 1, {})


def _shapes(manifest: Manifest) -> Payload:
    return Payload(manifest, sizes_only(manifest.size)) if manifest.size else Payload.empty()


def _by_group(manifests: dict[str, Manifest]) -> dict[str, Groups]:
    return {name: group_bytes(manifest) for name, manifest in manifests.items()}


def _alike(name: str, count: int, top_k: int) -> LayerScores:
    ones = torch.ones(count, dtype=torch.float64)
    return LayerScores(name, torch.eye(count, dtype=torch.float64), ones / 2, 1.0, ones * top_k, ones, count)


def mean_groups(rounds: Sequence[RoundBytes], direction: Literal["uplink", "downlink"]) -> dict[str, float]:
    """Return mean bytes by group over all rounds and their participants; empty without participants."""
    payloads = [groups for each in rounds for groups in getattr(each, direction).values()]
    names = sorted({group for groups in payloads for group in groups})
    return {name: sum(groups.get(name, 0) for groups in payloads) / len(payloads) for name in names}


def mean_packed(rounds: Sequence[RoundBytes]) -> float:
    """Return mean bytes of a reply over all rounds and their participants; 0 without participants."""
    sent = [size for each in rounds for size in each.packed.values()]
    return sum(sent) / len(sent) if sent else 0.0
