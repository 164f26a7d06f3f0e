"""FedMoE: every client trains a sub-MoE of the experts that its own tokens use most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from flexperts.communication.average import holders_mean
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.methods.kit import method
from flexperts.methods.kit.held_experts import ROUTER, OwnParts, held_part, joined_rows, split_rows
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site, Turn
from flexperts.parameters.vector import Manifest, Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part, key
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.selection.selection import LayerScores


class FedMoEStyle(OwnParts):
    """Sub-MoEs of the most-activated experts, aggregated expert by expert over those who hold them.

    Source: FedMoE (arXiv 2408.11304), its two stages and its modular aggregation.
    S_{i,l} = the ``keep`` * N experts of layer l to which client i's own tokens were routed most often.
    Expert e: unchanged if no participant holds it, copied if one does, else sum_{i holds e} n_i E_{i,e} / sum n_i.
    Trained: attention LoRA, a LoRA on each held expert, a delta on each held expert's router row.
    Sent: attention LoRA, held experts' LoRA, held router rows. Aggregated: LoRA by FedAvg; experts and router rows
    by the rule above, weighted by rows. Stays: nothing; but the server learns which experts each client holds.
    Inference: global LoRA with the client's own sub-MoE.
    Open choices: the counts come from the pretrained model on the client's calibration rows
    (``graft.calibration_rows``): the paper's brief tuning beforehand, its search for the budget and the server's
    recommendation of experts are not specified there and are left out, so a client's choice stands for the run.
    Experts train by LoRA and not whole; their A start alike on all clients. The router still scores all N experts:
    a choice that is not held weighs 0 and the token's held ones are scaled to the old sum (a router with the kept
    rows alone would send the token on to another held expert). Rows that are not held do not train.
    The global state is attention LoRA on the untouched experts.
    """

    name = "fedmoe_style"
    one_global = False
    summary = "each client trains the experts it uses most; every expert is averaged over its holders"
    source = "arXiv 2408.11304"
    sends = "attention LoRA, held experts' LoRA and router rows, and which these are"
    plan_note = "FLOPs take all experts as used alike; clients hold those that they use most"
    needs_experts = True

    class Options(method.Options):
        """The sub-MoE's size and what of it trains."""

        keep: float = Field(0.5, gt=0, le=1)
        """Share of each layer's experts that a client holds; never fewer than the router picks for a token."""
        rank: int | None = Field(None, ge=1)
        """LoRA rank of the experts, at scaling lora.alpha / rank; without it, lora.rank."""
        router: bool = True
        """Train the held experts' router rows too."""

    # A client's model.

    def prepare(self, site: Site) -> Prepared:
        """Keep the experts that the client's own tokens are routed to most often."""
        return Prepared({s.name: most_activated(s, self.options.keep) for s in site.score_experts()})

    def reports_prepared(self, config: RunConfig) -> bool:
        """The held experts are told."""
        return True

    def report(self, site: Site) -> Any:
        """Tell which experts are held: by these the server knows what to send and what to expect."""
        return {key(name): list(indices) for name, indices in site.prepared.choice.items()}

    def initial_site(self, site: Site) -> Site:
        """Return a site that holds every expert."""
        return replace(site, prepared=Prepared({e.name: tuple(range(e.num_experts)) for e in site.experts}))

    def parts(self, site: Site) -> dict[str, Part]:
        """Restrict every layer to the held experts and adapt these."""
        rank, alpha = self.options.rank or site.config.lora.rank, site.config.lora.alpha
        experts = ExpertAdapters(
            site.experts,
            site.prepared.choice,
            rank,
            alpha,
            lambda layer, expert: site.common_generator("expert", layer, expert),
            restrict=True,
        )
        if not self.options.router:
            return {"experts": experts}
        router = RouterDeltas(site.lora.base, site.experts)
        for layer, indices in site.prepared.choice.items():
            router.layers[key(layer)].register_hook(_only_rows(indices))
        return {"experts": experts, "router": router}

    # A client's round.

    def receive(self, turn: Turn) -> None:
        """Load LoRA and held experts, and put the held router rows in their places."""
        held = _held(turn)
        rows = {n: t for n, t in turn.received.items() if n.startswith(ROUTER)}
        whole = {n: torch.zeros_like(turn.split.shared[n]) for n in rows}
        for name, tensor in rows.items():
            whole[name][list(held[name.removeprefix(ROUTER)])] = tensor
        turn.load({**turn.received, **whole})

    def outgoing(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return LoRA, held experts and held router rows."""
        held = _held(turn)
        return {
            n: p.detach()[list(held[n.removeprefix(ROUTER)])] if n.startswith(ROUTER) else p
            for n, p in turn.split.shared.items()
        }

    # The server.

    def broadcast(self, server: Server, client: str) -> Payload:
        """Send LoRA and the client's own experts and router rows."""
        return Payload.of(held_part(server.shared.tensors(), server.reports[client]))

    def uplink(self, server: Server, client: str) -> Manifest:
        """A client sends what it was sent."""
        return Manifest.of(held_part(server.shared.tensors(), server.reports[client]))

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average every expert, and every router row, over those who hold it."""
        current = server.shared.tensors()
        every = {n.removeprefix(ROUTER): range(len(t)) for n, t in current.items() if n.startswith(ROUTER)}
        by_row = (
            replace(u, payload=Payload.of(split_rows(u.tensors(), server.reports[u.client]))) for u in updates
        )
        mean = holders_mean(split_rows(current, every), by_row)
        server.shared = Payload.of(joined_rows(mean, current))


def most_activated(scores: LayerScores, keep: float) -> tuple[int, ...]:
    """Return the share of a layer's experts with the highest counts, in their own order; ties go to the first."""
    per_token = round(float(scores.counts.sum()) / scores.tokens)
    count = max(per_token, round(keep * len(scores.counts)))
    return tuple(sorted(scores.counts.argsort(descending=True, stable=True)[:count].tolist()))


def _held(turn: Turn) -> dict[str, tuple[int, ...]]:
    return {key(name): indices for name, indices in turn.site.prepared.choice.items()}


def _only_rows(indices: Sequence[int]) -> Any:
    """Return a gradient hook that lets only some rows learn."""

    def keep(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[list(indices)] = gradient[list(indices)]
        return kept

    return keep
