"""FedMoE: every client trains a sub-MoE of the experts that its own tokens use most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flexperts.communication.average import holders_mean
from flexperts.communication.messages import Update
from flexperts.communication.schema import Count, Word
from flexperts.config.run import RunConfig
from flexperts.errors import incompatible, shown
from flexperts.methods.kit.held_experts import (
    EXPERTS,
    ROUTER,
    OwnParts,
    held_part,
    joined_routers,
    place_of,
    split_routers,
)
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site, Turn
from flexperts.parameters.vector import Manifest, Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.part import Part, key
from flexperts.parts.router_deltas import RouterDeltas
from flexperts.selection.selection import LayerScores


class FedMoEStyle(OwnParts):
    """Sub-MoEs of the most-activated experts; every expert is aggregated over the clients that hold it.

    Source: FedMoE (arXiv 2408.11304), its two stages and its modular aggregation.
    S_{i,l} = the ``keep`` * N experts of layer l to which client i's own tokens were routed most often.
    Expert e: unchanged if no participant holds it, copied if one does, else sum_{i holds e} n_i E_{i,e} / sum n_i.
    Trained: attention LoRA, a LoRA on each held expert, a delta on each held expert's router row.
    Sent: attention LoRA, held experts' LoRA, held router rows. Aggregated: LoRA by FedAvg; experts and router rows
    by the rule above, weighted by rows. Stays: nothing; but the server learns which experts each client holds.
    Inference: global LoRA with the client's own sub-MoE.
    Open choices: the counts come from the pretrained model on the client's calibration rows
    (``graft.calibration_rows``). The paper does not specify its brief tuning beforehand, its search for the budget
    and the server's recommendation of experts; they are left out, so a client's choice is fixed for the run.
    Experts train by LoRA, not with all their weights; their A start alike on all clients. The router still scores
    all N experts: an expert that is not held gets weight 0, and the token's held experts are scaled to the old sum
    (a router with the kept rows alone would route the token to another held expert). Rows that are not held do not
    train. The global state is attention LoRA on the untouched experts.
    """

    name = "fedmoe_style"
    one_global = False
    summary = "each client trains the experts it uses most; every expert is averaged over its holders"
    source = "arXiv 2408.11304"
    sends = "attention LoRA, held experts' LoRA and router rows, and the held experts' numbers"
    plan_note = "FLOPs assume that all experts are used equally; clients hold those that they use most"
    needs_experts = True
    report_type: ClassVar[Any] = dict[Word, Annotated[list[Count], Field(min_length=1)]]

    class Options(OwnParts.Options):
        """Size of the sub-MoE, and its trained parts."""

        keep: float = Field(0.5, gt=0, le=1)
        """Share of each layer's experts that a client holds; at least as many as the router picks for a token."""
        rank: int | None = Field(None, ge=1)
        """LoRA rank of the experts, at scaling lora.alpha / rank; without it, lora.rank."""
        router: bool = True
        """Whether the held experts' router rows train too."""

    options: Options

    # A client's model.

    def prepare(self, site: Site) -> Prepared:
        """Choose the experts to which the client's own tokens are routed most often."""
        return Prepared({s.name: most_activated(s, self.options.keep) for s in site.score_experts()})

    def reports_prepared(self, config: RunConfig) -> bool:
        """Return True: the report names the held experts."""
        return True

    def report(self, site: Site) -> dict[str, list[int]]:
        """Return the held experts by layer, from which the server knows what to send and to expect."""
        return {key(name): list(indices) for name, indices in site.prepared.choice.items()}

    def initial_site(self, site: Site) -> Site:
        """Return a site that holds every expert."""
        return replace(site, prepared=Prepared({e.name: tuple(range(e.num_experts)) for e in site.experts}))

    def parts(self, site: Site) -> dict[str, Part]:
        """Return parts that restrict every layer to the held experts and adapt them."""
        rank, alpha = self.options.rank or site.config.lora.rank, site.config.lora.alpha
        experts = ExpertAdapters(
            site.experts,
            site.prepared.choice,
            rank,
            alpha,
            lambda layer, expert: site.common_generator("expert", layer, expert),
            dropout=site.config.lora.dropout,
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
        """Load LoRA, held experts, and the held rows of every router."""
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

    def check_report(self, server: Server, client: str) -> None:
        """Refuse a report of other layers or experts than those of the shared weights."""
        held, known = server.reports[client], defaultdict[str, set[int]](set)
        for name in server.shared.manifest.names:
            if name.startswith(EXPERTS):
                layer, expert = place_of(name)
                known[layer].add(expert)
        different = all(len(set(its)) == len(its) for its in held.values())
        if held.keys() != known.keys() or not different or not all(set(held[n]) <= known[n] for n in known):
            raise incompatible(
                f"{client} reports experts {shown(held)}", "each layer's are different ones of its base"
            )

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return LoRA and the client's held experts and router rows."""
        return Payload.of(held_part(server.shared.tensors(), server.reports[client]))

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare a reply with the same tensors as the broadcast."""
        return Manifest.of(held_part(server.shared.tensors(), server.reports[client]))

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Average every expert and every router row over its holders."""
        current = server.shared.tensors()
        every = {n.removeprefix(ROUTER): range(len(t)) for n, t in current.items() if n.startswith(ROUTER)}
        by_row = (
            replace(u, payload=Payload.of(split_routers(u.tensors(), server.reports[u.client]))) for u in updates
        )
        mean = holders_mean(split_routers(current, every), by_row)
        server.shared = Payload.of(joined_routers(mean, current))


def most_activated(scores: LayerScores, keep: float) -> tuple[int, ...]:
    """Return the experts of a layer with the highest counts, sorted by number; ties go to the lower number."""
    per_token = round(float(scores.counts.sum()) / scores.tokens)
    count = max(per_token, round(keep * len(scores.counts)))
    return tuple(sorted(scores.counts.argsort(descending=True, stable=True)[:count].tolist()))


def _held(turn: Turn) -> dict[str, tuple[int, ...]]:
    return {key(name): indices for name, indices in turn.site.prepared.choice.items()}


def _only_rows(indices: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return a gradient hook that lets only the given rows train."""

    def keep(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[list(indices)] = gradient[list(indices)]
        return kept

    return keep
