"""FedAMoLE: a pool of LoRA experts; every client holds the experts that fit its tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from flexperts.communication.average import check_finite, holders_mean
from flexperts.communication.messages import DERIVED, Update
from flexperts.data.batches import pad_batch
from flexperts.errors import ConfigError
from flexperts.methods.kit.held_experts import OwnParts
from flexperts.methods.kit.local_steps import balanced
from flexperts.methods.kit.method import State
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.modeling.recording import mean_inputs
from flexperts.parameters.vector import Manifest, Payload
from flexperts.parts.lora_mixture import LoraMixture
from flexperts.parts.part import Part, key
from flexperts.training.local import TrainResult

_MIXTURES = "mixture.sites."
_EXPERT_MEAN, _TOKEN_MEAN, _ASSIGNED = f"{DERIVED}expert.", f"{DERIVED}tokens.", "assigned."
"""Starts of names: ``<layer>.<expert>``; ``<layer>``, in the server's memory ``<layer>.<client>``; ``<layer>``."""


class FedAMoLE(OwnParts):
    """Mixtures of LoRA experts on attention; the server assigns the experts of a pool to clients.

    Source: FedAMoLE (arXiv 2411.19128).
    y = W x + s (B_s A_s x + sum_{e in Top2} w_e B_e A_e x); w = softmax_e((A_e x) . (P x) / sqrt(r)) over the held
    experts, cut to the best two and scaled to sum 1; s = alpha / r. Loss: response NLL + ``balance`` * the sum over
    adapted layers of E sum_e f_e P_e: E held experts, f_e the share of the best-two choices that are e, P_e the
    mean of softmax's value for e (Switch's form, as in the release: a sum over layers, and both choices count).
    After training, on ``aux`` of its train rows, client i reports a_{i,e} = mean A_e x and t_i = mean P x. Reverse
    selection, for each adapted layer: maximise sum_{e,i} q_{e,i} z_{e,i}, z binary,
    q_{e,.} = softmax_i(a_e . t_i / sqrt(r)), with c clients per expert and min to max experts per client.
    Trained: shared expert, held experts, P. Sent: these, and the means. Aggregated: shared expert and P by FedAvg;
    every expert and its a_e over its holders, by rows; an expert without a holder in the round stays. Stays:
    nothing; PEFT's own adapter is not used. Inference: the experts assigned to the client after the last round.
    Open choices: each adapted layer has a separate pool and assignment. The integer program is solved by HiGHS
    (scipy) instead of SCIP; among equal optima the solver decides. Round 1 has a random feasible assignment. The
    paper averages P uniformly over clients; here by rows. The auxiliary rows are trained on too. A client that has
    not taken part yet has t_i = 0. Every client has the whole pool in memory and trains its share of it: the pool
    is small. The paper's 30 experts are for 10 clients; the default of 12 is for four. ``lora.dropout`` is on the
    experts' input; the scores see the whole one.
    """

    name = "fedamole"
    summary = "a pool of LoRA experts on attention; an integer program assigns them by each client's tokens"
    source = "arXiv 2411.19128"
    sends = "shared LoRA expert, token projection, held LoRA experts and mean embeddings"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "personalized")
    plan_note = (
        "bytes are a mean over clients, because assignments change; the rest counts the whole pool on each client"
    )

    class Options(OwnParts.Options):
        """The pool and its assignment."""

        experts: int = Field(12, ge=1)
        """N, experts in the pool of each adapted layer."""
        clients_per_expert: int = Field(2, ge=1)
        """c, clients that hold an expert."""
        min_experts: int = Field(2, ge=1)
        """Fewest experts that a client holds."""
        max_experts: int = Field(8, ge=1)
        """Most experts that a client holds."""
        balance: float = Field(1e-3, ge=0)
        """Weight of the load-balance loss, which is a sum over adapted layers."""
        aux: float = Field(0.05, gt=0, le=1)
        """Share of the train rows for the mean embeddings."""

    options: Options

    # A client.

    def parts(self, site: Site) -> dict[str, Part]:
        """Return the whole pool for every adapted layer; ``receive`` activates the client's experts."""
        pool, lora = self.options.experts, site.config.lora
        held = {name: range(pool) for name in site.lora.targets}
        mixture = LoraMixture(
            site.lora.base,
            held,
            pool=pool,
            rank=lora.rank,
            alpha=lora.alpha,
            seed=site.config.seed,
            dropout=lora.dropout,
        )
        return {"mixture": mixture}

    def trains(self, name: str) -> bool:
        """Return False for PEFT's adapter, which stays at zero: the mixture replaces it."""
        return not name.startswith(SHARED_PREFIX)

    def receive(self, turn: Turn) -> None:
        """Load the received tensors and activate their experts alone."""
        turn.load(turn.received, {n: p for n, p in turn.split.shared.items() if n in turn.received})
        _mixture(turn).activate(_held(turn))

    def train(self, turn: Turn) -> TrainResult:
        """Train with the load-balance loss."""
        return turn.fit(objective=balanced(turn.objective, _mixture(turn), self.options.balance))

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return the received tensors after training, and the mean embeddings of experts and tokens."""
        sent: dict[str, Tensor] = {n: p for n, p in turn.split.shared.items() if n in turn.received}
        means = self._mean_inputs(turn)
        for layer, experts in _held(turn).items():
            start, mean = f"{_MIXTURES}{key(layer)}.", means[layer]
            sent[f"{_TOKEN_MEAN}{key(layer)}"] = turn.split.shared[f"{start}projection"].detach() @ mean
            for e in experts:
                # A_e is linear: the mean of A_e x is A_e of the mean x.
                sent[f"{_EXPERT_MEAN}{key(layer)}.{e}"] = turn.split.shared[f"{start}experts.{e}.A"].detach() @ mean
        return sent

    def _mean_inputs(self, turn: Turn) -> dict[str, Tensor]:
        """Return the mean input ``[in]`` of every adapted layer on the auxiliary rows, always the same rows."""
        site, settings = turn.site, turn.settings
        count = max(1, round(self.options.aux * len(site.examples)))
        drawn = torch.randperm(len(site.examples), generator=site.generator("aux"))[:count].tolist()
        rows, size = [site.examples[i] for i in drawn], settings.training.rows_per_pass
        batches = [pad_batch(rows[s : s + size], site.pad_token_id) for s in range(0, count, size)]
        layers = {name: site.lora.module(name) for name in site.lora.targets}
        return mean_inputs(site.lora.base, layers, batches, settings.precision)

    # The server.

    def check_clients(self, clients: Collection[str]) -> None:
        """Refuse a pool that cannot be assigned to this number of clients."""
        check_places(self.options.experts, len(clients), *self._bounds)

    def start(self, server: Server) -> None:
        """Assign experts at random for round 1."""
        stream = server.generator("assignment")
        for layer, rank in _layers(server).items():
            draw = torch.rand(self.options.experts, len(server.clients), generator=stream)
            server.memory[_ASSIGNED + layer] = assign_experts(draw, *self._bounds)
            server.memory |= {f"{_EXPERT_MEAN}{layer}.{e}": torch.zeros(rank) for e in range(self.options.experts)}

    def regroup(self, server: Server) -> None:
        """Assign the experts to the current clients, and forget the embeddings of clients that have left."""
        own = {f"{_TOKEN_MEAN}{layer}.{client}" for layer in _layers(server) for client in server.clients}
        server.memory = {n: t for n, t in server.memory.items() if not n.startswith(_TOKEN_MEAN) or n in own}
        if server.round:
            self._reassign(server)
        else:
            self.start(server)

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the tensors that all clients hold, and the client's assigned experts."""
        return Payload.of(_part(server, _assigned_to(server, client)))

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare the tensors of the broadcast, and one embedding per held expert and per layer."""
        held = _assigned_to(server, client)
        sent = _part(server, held)
        for layer, rank in _layers(server).items():
            names = [f"{_EXPERT_MEAN}{layer}.{e}" for e in held[layer]]
            sent |= dict.fromkeys([*names, _TOKEN_MEAN + layer], torch.empty(rank))
        return Manifest.of(sent)

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average every tensor over its holders, and assign the experts again."""
        embeddings = {n: t for n, t in server.memory.items() if n.startswith(_EXPERT_MEAN)}
        mean = holders_mean(server.shared.tensors() | embeddings, _without_tokens(server, updates))
        server.memory |= {n: mean.pop(n) for n in embeddings}
        server.shared = Payload.of(mean)
        self._reassign(server)

    def _reassign(self, server: Server) -> None:
        """Assign the experts by the last known embeddings; those of a client that never took part are zero."""
        memory, every = server.memory, range(self.options.experts)
        for layer, rank in _layers(server).items():
            experts = torch.stack([memory[f"{_EXPERT_MEAN}{layer}.{e}"] for e in every])
            names = [f"{_TOKEN_MEAN}{layer}.{client}" for client in sorted(server.clients)]
            tokens = torch.stack([memory.get(name, torch.zeros(rank)) for name in names])
            memory[_ASSIGNED + layer] = assign_experts(affinity(experts, tokens), *self._bounds)

    @property
    def _bounds(self) -> tuple[int, int, int]:
        """Clients per expert; fewest and most experts per client."""
        return self.options.clients_per_expert, self.options.min_experts, self.options.max_experts


def _mixture(turn: Turn) -> LoraMixture:
    mixture = turn.parts["mixture"]
    assert isinstance(mixture, LoraMixture)
    return mixture


def _held(turn: Turn) -> dict[str, list[int]]:
    """Return the experts that were sent, by adapted layer."""
    return {
        name: [e for e in pool if f"{_MIXTURES}{key(name)}.experts.{e}.A" in turn.received]
        for name, pool in _mixture(turn).held.items()
    }


def _layers(server: Server) -> dict[str, int]:
    """Return every adapted layer's rank, by the layer's name in parameter names."""
    sent = server.shared.tensors().items()
    end = ".projection"
    return {n.removeprefix(_MIXTURES).removesuffix(end): t.shape[0] for n, t in sent if n.endswith(end)}


def _assigned_to(server: Server, client: str) -> dict[str, list[int]]:
    """Return the experts that a client holds, by layer."""
    place = sorted(server.clients).index(client)
    return {n: server.memory[_ASSIGNED + n][:, place].nonzero().flatten().tolist() for n in _layers(server)}


def _part(server: Server, held: Mapping[str, Collection[int]]) -> dict[str, Tensor]:
    """Return all shared tensors except the experts that are not held."""
    part = {}
    for name, tensor in server.shared.tensors().items():
        layer, kind, *rest = name.removeprefix(_MIXTURES).split(".")
        if kind != "experts" or int(rest[0]) in held[layer]:
            part[name] = tensor
    return part


def _without_tokens(server: Server, updates: Iterable[Update]) -> Iterator[Update]:
    """Store each client's token embeddings in the server's memory, and yield the other tensors."""
    for update in updates:
        check_finite(update)
        tensors = update.tensors()
        own = {n: t for n, t in tensors.items() if n.startswith(_TOKEN_MEAN)}
        server.memory |= {f"{n}.{update.client}": t.clone() for n, t in own.items()}
        yield replace(update, payload=Payload.of({n: t for n, t in tensors.items() if n not in own}))


def check_places(experts: int, clients: int, clients_per_expert: int, least: int, most: int) -> None:
    """Refuse numbers for which there is no assignment."""
    places = experts * clients_per_expert
    fewest, greatest = clients * least, clients * min(most, experts)
    if clients_per_expert > clients or not fewest <= places <= greatest:
        raise ConfigError(
            f"{experts} experts x {clients_per_expert} holders over {clients} clients",
            f"each client holds {least} to {most} different experts, which makes {fewest} to {greatest} places",
            "change method.options experts, clients_per_expert, min_experts or max_experts",
        )


def affinity(experts: Tensor, tokens: Tensor) -> Tensor:
    """Return q ``[N, C]``, softmax over clients, from embeddings ``experts [N, r]`` and ``tokens [C, r]``."""
    return (experts.double() @ tokens.double().T / math.sqrt(experts.shape[1])).softmax(1)


def assign_experts(gain: Tensor, clients_per_expert: int, least: int, most: int) -> Tensor:
    """Return the assignment ``[N, C]`` of 0 and 1 with the largest total gain.

    Args:
        gain: The gain if client i holds expert e, ``[N, C]``.
        clients_per_expert: Sum of every row.
        least, most: Bounds on the sum of every column.
    """
    experts, clients = gain.shape
    rows = np.kron(np.eye(experts), np.ones((1, clients)))
    columns = np.kron(np.ones((1, experts)), np.eye(clients))
    holders = LinearConstraint(rows, clients_per_expert, clients_per_expert)
    limits = [holders, LinearConstraint(columns, least, most)]
    size = experts * clients
    solved = milp(
        -gain.double().numpy().ravel(), constraints=limits, integrality=np.ones(size), bounds=Bounds(0, 1)
    )
    return torch.from_numpy(solved.x.round()).float().view(experts, clients)
