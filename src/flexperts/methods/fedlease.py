"""FedLEASE: clients are clustered by their LoRA, each cluster trains an expert, and all route over all experts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from flexperts.communication.average import checked, holders_mean
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.parameters.vector import Manifest, Payload, copy_tensors
from flexperts.parts.part import Part
from flexperts.parts.routed_lora import RoutedLora
from flexperts.training.local import TrainResult

_PART = "mixture"
_OWN, _ROUTER = ".experts.0.", ".router"
"""In parameter names: the own expert, which is the first on every client, and the router."""
_CLUSTER, _EXPERT, _CENTRE = "cluster.", "expert.", "centre."
"""In the server's memory: ``<client>`` -> its cluster; ``<cluster>.<parameter>``; ``<cluster>`` -> a direction."""


class FedLEASE(Method):
    """As many LoRA experts as there are clusters of clients; each trains its cluster's and routes over all of them.

    Source: Wang et al., NeurIPS 2025 (arXiv 2509.15087), with its official code.
    Rounds 1..w: every client trains a LoRA alone. Then, with d_ij = mean over adapted layers of 1 - cos(B_i, B_j):
    clusters by average linkage on d; their number M, 2 to ``max_experts``, has the largest mean silhouette; expert
    j = mean of A and of B over cluster j's clients. Later rounds, on a client of cluster c:
    y = W x + s sum_{k in TopM} w_k B_{e(k)} A_{e(k)} x, w = softmax(R x) cut to the best M slots and scaled to sum
    1; R maps to 2M - 1 slots, of which M stand for the experts and M - 1 more for expert c, so that a token can use
    c alone; s = alpha / r. Expert c and its R <- mean over the members of cluster c.
    Trained: in rounds 1..w the client's LoRA; then expert c and R. Sent: nothing before round w; in it the LoRA;
    then expert c and R. Aggregated: as above; every client counts once. Stays: nothing. Inference: all experts with
    the cluster's router after the last round.
    Open choices: all clients take part in rounds 1..w, even if only a share is sampled per round. A client without
    a cluster (it was away in round w, or came later) trains a LoRA alone in the next round that it takes part in,
    and sends it; the server then puts it into the cluster with the smallest mean of d over the members of round w.
    Until then its model is its LoRA alone. Means are over the members that take part in the round; an expert
    without any stays as it is. Fewer than three clients in round w have no silhouette: each is a cluster. In the
    released code, each client's first round after the clustering starts from its own LoRA; here from the cluster's
    mean, as in the paper. LoRAs and routers start alike on all clients. A cluster of one client has that client's
    LoRA as its expert, which all clients receive. On a client, its own expert has number 0.
    """

    name = "fedlease"
    summary = "clients clustered by their LoRA; one LoRA expert per cluster, and a router over all experts"
    source = "Wang et al., NeurIPS 2025, arXiv 2509.15087"
    sends = "LoRA at the end of the warm-up, then the cluster's LoRA expert and router"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    one_global = False
    additive = False
    sends_back = True
    budget_note = (
        "FedAvg's steps, but all clients train in the warm-up (warmup_rounds, {warmup_rounds}), even if only a "
        "share is sampled per round"
    )
    plan_note = "as if there were max_experts clusters, or one fewer than clients; a run can have fewer"

    class Options(Method.Options):
        """The warm-up and the number of experts."""

        warmup_rounds: int = Field(5, ge=1)
        """w, rounds in which clients train alone; the last of them ends with the clustering."""
        max_experts: int = Field(4, ge=2)
        """Most clusters, and so most experts."""

    options: Options

    def check(self, config: RunConfig) -> None:
        """Refuse a recipe that ends with the warm-up."""
        warmup, rounds = self.options.warmup_rounds, config.federation.rounds
        if warmup >= rounds:
            raise ConfigError(
                f"method.options.warmup_rounds = {warmup} with federation.rounds = {rounds}",
                "experts train in the rounds after the warm-up, so there must be at least one",
                f"set federation.rounds to {warmup + 1} or more, or method.options.warmup_rounds to fewer rounds",
            )

    @property
    def full_rounds(self) -> int:
        """The rounds of the warm-up: every client trains alone, and its LoRA decides its cluster."""
        return self.options.warmup_rounds

    # A client.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return room for all experts and slots; ``receive`` activates those that exist."""
        most, lora = self.options.max_experts, site.config.lora
        experts = RoutedLora(
            site.lora.base,
            site.lora.targets,
            experts=most,
            slots=2 * most - 1,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            seed=site.config.seed,
        )
        return {_PART: experts}

    def trains(self, name: str) -> bool:
        """Return whether a parameter is of the own expert or a router; PEFT's adapter stays at zero."""
        return name.startswith(f"{_PART}.") and (_OWN in name or name.endswith(_ROUTER))

    def shared(self, names: Collection[str]) -> set[str]:
        """Return all trained parameters: what is sent of them depends on the round."""
        return set(names)

    def receive(self, turn: Turn) -> None:
        """Load experts and router; without them the client's LoRA, which is then used alone."""
        mixture = turn.parts[_PART]
        assert isinstance(mixture, RoutedLora)
        if not turn.received:
            if turn.memory:
                copy_tensors(turn.memory, _pairs(turn.split.shared))
            mixture.activate([0], 1)
            return
        held = {n: p.detach() for n, p in (*turn.split.shared.items(), *turn.split.frozen.items())}
        copy_tensors(turn.received, {n: held[n][: len(t)] for n, t in turn.received.items() if n in held})
        slots = max(len(t) for n, t in turn.received.items() if n.endswith(_ROUTER))
        experts = (slots + 1) // 2
        mixture.activate([*range(experts), *[0] * (experts - 1)], experts)

    def train(self, turn: Turn) -> TrainResult:
        """Train; a LoRA that the client trains alone is kept until it has a cluster."""
        result = turn.fit()
        turn.memory.clear()
        if not turn.received:
            turn.memory |= {n: p.detach().clone() for n, p in _pairs(turn.split.shared).items()}
        return result

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return nothing before the last round of the warm-up, and then what ``uplink`` says."""
        if turn.round < self.options.warmup_rounds:
            return {}
        if not turn.received:
            return _pairs(turn.split.shared)
        return {n: p[: len(turn.received[n])] for n, p in turn.split.shared.items()}

    # The server.

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return all experts, the client's own first, and its cluster's router; nothing without a cluster."""
        if _CLUSTER + client not in server.memory:
            return Payload.empty()
        own = int(server.memory[_CLUSTER + client])
        sent, others = _of_cluster(server, own), [n for n in range(_count(server)) if n != own]
        for place, number in enumerate(others, 1):
            pairs = _pairs(_of_cluster(server, number))
            sent |= {name.replace(_OWN, f".experts.{place}."): tensor for name, tensor in pairs.items()}
        return Payload.of(sent)

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare expert and router of the client's cluster; without one its LoRA, at the end of the warm-up."""
        if _CLUSTER + client in server.memory:
            return Manifest.of(_of_cluster(server, int(server.memory[_CLUSTER + client])))
        sends = server.round + 1 >= self.options.warmup_rounds
        return Manifest.of(_pairs(server.shared.tensors()) if sends else {})

    def regroup(self, server: Server) -> None:
        """Forget the clusters of clients that have left; experts and their centres stay."""
        server.forget_departed(_CLUSTER)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average every cluster's expert and router; in the last round of the warm-up, make the clusters before."""
        if server.round + 1 < self.options.warmup_rounds:
            for _ in updates:
                pass
            return
        if not _count(server):
            updates = list(checked(updates))
            self._make_clusters(server, updates)
        alone: dict[str, dict[str, Tensor]] = {}
        experts = {n: t for n, t in server.memory.items() if n.startswith(_EXPERT)}
        server.memory |= holders_mean(experts, _by_cluster(server, updates, alone))
        for client, tensors in alone.items():
            near = [direction(tensors) @ server.memory[f"{_CENTRE}{j}"] for j in range(_count(server))]
            server.memory[_CLUSTER + client] = torch.stack(near).argmax()

    def _make_clusters(self, server: Server, updates: Sequence[Update]) -> None:
        """Divide the clients into clusters, each with its centre and with the routers' start."""
        tensors = [update.tensors() for update in updates]
        directions = torch.stack([direction(each) for each in tensors])
        if directions.is_meta:  # in a plan: as many as there can be
            labels = [i % most_clusters(len(updates), self.options.max_experts) for i in range(len(updates))]
        else:
            labels = clusters(1 - (directions @ directions.T).numpy(), self.options.max_experts)
        experts = len(set(labels))
        for update, label in zip(updates, labels, strict=True):
            server.memory[_CLUSTER + update.client] = torch.tensor(label)
        for j in range(experts):
            members = [place for place, label in enumerate(labels) if label == j]
            server.memory[f"{_CENTRE}{j}"] = directions[members].mean(0)
            for name, start in server.shared.tensors().items():
                server.memory[f"{_EXPERT}{j}.{name}"] = (
                    start[: 2 * experts - 1] if name.endswith(_ROUTER) else start
                )

    def adapter(self, server: Server) -> dict[str, Tensor]:
        """Return nothing: LoRA experts with a router are no adapter."""
        return {}


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the own expert's factors among tensors named as parameters."""
    return {name: tensor for name, tensor in tensors.items() if _OWN in name}


def _count(server: Server) -> int:
    """Return M, or 0 before the clustering."""
    return next(number for number in count() if f"{_CENTRE}{number}" not in server.memory)


def _of_cluster(server: Server, number: int) -> dict[str, Tensor]:
    """Return a cluster's expert and router under their names on its members."""
    return {name: server.memory[f"{_EXPERT}{number}.{name}"] for name in server.shared.manifest.names}


def _by_cluster(server: Server, updates: Iterable[Update], alone: dict[str, dict[str, Tensor]]) -> Iterator[Update]:
    """Yield every member's tensors under its cluster's names, with weight 1; collect those of other clients."""
    for update in updates:
        cluster, tensors = server.memory.get(_CLUSTER + update.client), update.tensors()
        if cluster is None:
            alone[update.client], tensors = tensors, {}
        own = {f"{_EXPERT}{int(cluster)}.{n}": t for n, t in tensors.items()} if cluster is not None else {}
        yield replace(update, payload=Payload.of(own), rows=1)


def direction(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the fp64 vector whose product with another client's is the mean over layers of cos(B_i, B_j).

    Args:
        tensors: One client's LoRA; a B that is zero has cosine 0 with every other.
    """
    layers = [F.normalize(tensors[n].double().flatten(), dim=0) for n in sorted(tensors) if n.endswith(f"{_OWN}B")]
    return torch.cat(layers) / math.sqrt(len(layers))


def most_clusters(clients: int, most: int) -> int:
    """Return the most clusters that so many clients can be divided into; from three on, one cluster has two."""
    return clients if clients < 3 else min(most, clients - 1)


def clusters(distances: NDArray[np.float64], most: int) -> list[int]:
    """Return every client's cluster, numbered by first member: average linkage, cut where silhouettes are largest.

    Args:
        distances: Symmetric, ``[C, C]``; the diagonal is not used.
        most: Most clusters, if there are more clients. Of equally good numbers the smallest is taken. With fewer
            than three clients, each is a cluster.
    """
    size = len(distances)
    if size < 3:
        return list(range(size))
    off = distances * (1 - np.eye(size))
    tree = linkage(squareform(off, checks=False), "average")
    cuts = [cut_tree(tree, n_clusters=number).ravel() for number in range(2, most_clusters(size, most) + 1)]
    best = max(cuts, key=lambda labels: silhouette(off, labels))
    numbers = {label: number for number, label in enumerate(dict.fromkeys(best.tolist()))}
    return [numbers[label] for label in best.tolist()]


def silhouette(distances: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the mean over clients of (b - a) / max(a, b); a client that is alone in its cluster counts 0.

    a is the mean distance to the other members of the client's cluster, b the smallest mean distance to another
    cluster's members.

    Args:
        distances: Symmetric with a zero diagonal, ``[C, C]``.
        labels: Every client's cluster, ``[C]``; at least two different ones.
    """
    total = 0.0
    for client, label in enumerate(labels):
        own = labels == label
        if (others := own.sum() - 1) == 0:
            continue
        a = distances[client, own].sum() / others
        b = min(distances[client, labels == other].mean() for other in set(labels.tolist()) - {label})
        total += (b - a) / max(a, b) if max(a, b) > 0 else 0.0
    return float(total / len(labels))
