"""The rounds of a run without data and weights: the method's code, run on shapes, decides what every client sends.

Clients' rows are unknown, so calibration scores are placeholders in which all experts are equal. Which experts a
method then chooses is arbitrary; how many it chooses is the same as in a run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flexperts.client.model import ClientModel
from flexperts.communication.compression import packed_bytes
from flexperts.communication.messages import Update
from flexperts.communication.secure.tally import message_bytes
from flexperts.communication.traffic import group_bytes, mean_with_weights
from flexperts.config.run import RunConfig
from flexperts.costs.messages import Encoded, Messages, PlannedDownlink
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site
from flexperts.parameters.vector import Manifest, Payload, sizes_only
from flexperts.protection.pipeline import is_secure
from flexperts.protection.secure import rules_of
from flexperts.seeding import drawn
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
        scores = []
        for layer in self.experts:
            ones = torch.ones(layer.num_experts, dtype=torch.float64)
            scores.append(
                LayerScores(layer.name, torch.diag(ones), ones / 2, 1.0, ones * self.top_k, ones, len(ones))
            )
        return scores


@dataclass(frozen=True)
class RoundBytes:
    """The payloads of one round, in bytes.

    Args:
        number: The round, from 1.
        uplink: Participating client -> bytes that it sends, by tensor group, before packing.
        downlink: Participating client -> bytes that it receives, by tensor group, before packing.
        packed: Participating client -> all bytes that it sends, packed or masked as the recipe says.
        keys: Participating client -> bytes that it receives for secure aggregation; empty without.
        received: Participating client -> bytes of the weights that it receives, packed as the recipe says.
        messages: The encoded messages of the round, with its evaluation.
    """

    number: int
    uplink: dict[str, Groups]
    downlink: dict[str, Groups]
    packed: dict[str, int]
    keys: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    messages: Messages = field(default_factory=Messages)

    @property
    def total(self) -> int:
        """Bytes of all clients in both directions."""
        return sum(self.packed.values()) + sum(self.received.values()) + sum(self.keys.values())


def planned_sites(model: ClientModel, clients: Collection[str], top_k: int) -> dict[str, PlannedSite]:
    """Return every client's site by name, as it is after all clients have joined."""
    sites = {}
    for name in sorted(clients):
        site = PlannedSite(**vars(model.site(name, [], Prepared())), top_k=top_k)
        sites[name] = replace(site, prepared=model.method.prepare(site))
    agreement = model.method.agree(_reports(model, sites))
    return {name: replace(site, agreement=agreement) for name, site in sites.items()}


def planned_rounds(model: ClientModel, sites: dict[str, PlannedSite]) -> list[RoundBytes]:
    """Return the recipe's rounds and the method's extra ones, with the clients that a run draws."""
    method, federation, compression = model.method, model.config.federation, model.config.compression
    server, initial = _server(model, sites)
    downlink, encoded = PlannedDownlink(model.config, server, initial), Encoded(model)
    rounds = []
    for number in range(1, method.total_rounds(federation.rounds) + 1):
        sampled = drawn(sites, federation.drawn(len(sites)), server.seed, number)
        participants = sorted(method.participants(server, sampled))
        answering = participants[: federation.buffer]
        asked = participants if number == 1 else answering
        broadcasts = {name: method.broadcast(server, name).manifest for name in asked}
        groups = {name: group_bytes(manifest) for name, manifest in broadcasts.items()}
        declared = {name: method.uplink(server, name) for name in answering}
        sent = {name: group_bytes(manifest) for name, manifest in declared.items()}
        packed = {name: packed_bytes(manifest.size, compression) for name, manifest in declared.items()}
        keys = dict[str, int]()
        if is_secure(model.config) and method.sends_weights(server):
            privacy = model.config.privacy
            value = rules_of(privacy).numbers(len(participants)).dtype.itemsize
            added = message_bytes(participants, privacy.survivors, agreement=privacy.agreement)
            packed = {name: value * manifest.size + added[name][0] for name, manifest in declared.items()}
            keys = {name: size for name, (_, size) in added.items()}
        requests = {name: downlink.request(name, manifest) for name, manifest in broadcasts.items()}
        received = {name: request.size for name, request in requests.items()}
        messages = encoded.training(server, number, requests, declared, packed, keys)
        rounds.append(RoundBytes(number, sent, groups, packed, keys, received, messages))
        if method.sends_back:
            updates = [Update(name, _shapes(manifest), 1, {}) for name, manifest in declared.items()]
            method.aggregate(server, updates)
        downlink.trained(participants, new=method.sends_weights(server) and _moves(model.config, number))
        server.round = number
        if encoded.is_evaluated(number):
            scored = model.config.evaluation.scored(sites)
            finals = {name: downlink.request(name, method.final(server, name).manifest) for name in scored}
            messages.add(encoded.evaluation(server, finals))
            downlink.received(scored)
    return rounds


def _moves(config: RunConfig, number: int) -> bool:
    """Return whether a round can change the weights: the first step of a warm-up has the rate 0."""
    training, rounds = config.training, config.federation.rounds
    return number > 1 or training.local_steps != 1 or not round(training.warmup_ratio * rounds)


def _reports(model: ClientModel, sites: dict[str, PlannedSite]) -> dict[str, Any]:
    return {name: model.method.report(site) for name, site in sites.items()}


def _server(model: ClientModel, sites: dict[str, PlannedSite]) -> tuple[Server, Manifest]:
    """Return the server's state before round 1, and the tensors that clients start from."""
    first = next(iter(sites.values()))
    with model.lend(model.method.initial_site(first), {}) as (split, _):
        shared = _shapes(Manifest.of(model.method.initial(split)))
    server = Server(
        shared,
        dict.fromkeys(sites, 1),
        _reports(model, sites),
        first.agreement,
        seed=model.config.seed,
        rounds=model.config.federation.rounds,
    )
    model.method.start(server)
    return server, shared.manifest


def _shapes(manifest: Manifest) -> Payload:
    return Payload(manifest, sizes_only(manifest.size)) if manifest.size else Payload.empty()


def mean_packed(rounds: Sequence[RoundBytes]) -> float:
    """Return mean bytes of the replies that hold weights; 0 without any."""
    return mean_with_weights((size, _held(r.uplink[name])) for r in rounds for name, size in r.packed.items())


def mean_received(rounds: Sequence[RoundBytes]) -> float:
    """Return mean bytes of the weights in the requests to train that hold any."""
    return mean_with_weights((size, _held(r.downlink[name])) for r in rounds for name, size in r.received.items())


def mean_keys(rounds: Sequence[RoundBytes]) -> float:
    """Return mean bytes that a client receives for secure aggregation in a round in which it sends weights."""
    return mean_with_weights((r.keys.get(name, 0), _held(sent)) for r in rounds for name, sent in r.uplink.items())


def mean_total(rounds: Sequence[RoundBytes]) -> float:
    """Return mean bytes of all clients, in both directions, of the rounds in which clients send weights."""
    return mean_with_weights((each.total, sum(map(_held, each.uplink.values()))) for each in rounds)


def _held(groups: Groups) -> int:
    return sum(groups.values())
