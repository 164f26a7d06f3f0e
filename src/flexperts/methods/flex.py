"""FLEx: selective aggregation, expert grafting, adaptive gate; and its variants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field

from flexperts.communication.average import checked, weighted_mean
from flexperts.communication.messages import Update
from flexperts.communication.schema import Number, Word
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.local_steps import personal_then_shared, proximal
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.personal_rounds import PersonalRounds
from flexperts.methods.kit.ranks import Factors, factors, named, truncated_mean
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Prepared, Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.moe.router import expert_rows
from flexperts.parameters.vector import Payload
from flexperts.parts.expert_adapters import ExpertAdapters
from flexperts.parts.grafts import Grafts, Scales
from flexperts.parts.part import Part
from flexperts.selection.rules import coefficients, pick_layers, select
from flexperts.selection.selection import LayerScores
from flexperts.training.local import LocalSettings, StepHooks, TrainResult

_COMMON = "common_graft"


class Grafted(Method):
    """Base of methods with FLEx's grafts: how experts are chosen, and which parts and parameters a client has."""

    keeps = "grafted experts and their gate"
    needs_experts = True
    report_type: ClassVar[Any] = dict[Word, list[Number]] | None

    def prepare(self, site: Site) -> Prepared:
        """Select the experts to graft on the client's own rows, by the rule that the recipe names."""
        graft, stream = site.config.graft, site.generator("selection")
        layers = pick_layers(site.score_experts(), graft.layers)
        choice = {s.name: select(graft.selection, s, graft.experts, stream) for s in layers}
        return Prepared(choice, {s.name: s.relative.tolist() for s in layers}, _scales(graft.scale, layers, choice))

    def reports_prepared(self, config: RunConfig) -> bool:
        """Return whether clients have to choose a common expert."""
        return config.graft.sharing != "personal"

    def report(self, site: Site) -> dict[str, list[float]] | None:
        """Return the reconstruction losses if clients have to choose a common expert, else None."""
        return site.prepared.selection if self.reports_prepared(site.config) else None

    def agree(self, reports: Mapping[str, dict[str, list[float]] | None]) -> dict[str, list[int]] | None:
        """Return every layer's experts, ranked by mean loss over the clients; None without reported losses."""
        told = [report for report in reports.values() if report]
        if not told:
            return None
        means = {layer: np.mean([report[layer] for report in told], axis=0) for layer in told[0]}
        return {layer: np.argsort(losses, kind="stable").tolist() for layer, losses in means.items()}

    def parts(self, site: Site) -> dict[str, Part]:
        """Return the client's own grafts, the common grafts, or both."""
        graft, prepared = site.config.graft, site.prepared
        if graft.place == "in_place":
            stream = site.generator("graft")
            return {"graft": ExpertAdapters(site.experts, prepared.choice, graft.rank, graft.alpha, stream)}
        parts: dict[str, Part] = {}
        if graft.sharing != "personal":
            # Before there is an agreement, any expert gives the names and shapes.
            common = site.agreement or {layer: range(graft.experts) for layer in prepared.choice}
            choice = {layer: tuple(ranked[: graft.experts]) for layer, ranked in common.items()}
            parts[_COMMON] = self._grafts(site, choice, {}, site.common_generator(_COMMON))
        if graft.sharing != "shared":
            parts["graft"] = own = self._grafts(site, prepared.choice, prepared.scales, site.generator("graft"))
            for layer in own if _COMMON in parts else ():
                layer.disturb(site.generator("disturbance"))
        return parts

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of LoRA and the common grafts."""
        return {name for name in names if name.startswith((SHARED_PREFIX, f"{_COMMON}."))}

    def _grafts(
        self, site: Site, choice: Mapping[str, Sequence[int]], scales: Scales, stream: torch.Generator
    ) -> Grafts:
        graft = site.config.graft
        from_router = [e for e in site.experts if e.name in choice] if graft.gate_start == "router" else []
        return Grafts(
            site.experts,
            choice,
            rank=graft.rank,
            alpha=graft.alpha,
            gate_bias=graft.gate_bias,
            scales=scales or None,
            silent=graft.start == "silent",
            gate_weights={e.name: expert_rows(site.lora.base, e, choice[e.name]) for e in from_router},
            difference=graft.opens_to(self.opens_to) == "difference",
            generator=stream,
        )


class Flex(PersonalRounds, Grafted):
    """Personal experts and shared attention LoRA.

    Source: arXiv 2506.00965 (selective aggregation, expert grafting, adaptive gate).
    y = sum_{j in TopK} g_j(x) E_j(x) + sum_p c_p sigmoid(G_p(x)) E_p(x), with c_p = 1 (``graft.scale``); E_p starts
    as the pretrained expert E_s that best reproduces the layer's output on the client's rows (``graft.selection``).
    By default two things are not the paper's, because validation rows were better with them: E_p(x) - E_s(x) in the
    place of E_p(x) (``graft.output``), so that the untrained graft changes nothing; and AdamW's moments of the
    personal part stay from round to round (``training.personal_moments``). ``graft.output = "expert"`` with
    ``personal_moments = "fresh"`` is the paper's.
    Trained: attention LoRA, the k personal experts of every MoE layer and their sigmoid gate, together.
    Sent: attention LoRA. Aggregated: its mean by rows. Stays: experts and gate. Frozen: all pretrained weights.
    Inference: last global LoRA with the client's own experts and gate.
    Open choices: the source leaves open how the gate starts (ours: weight 0, bias ``graft.gate_bias``; with
    ``graft.gate_start = "router"`` the weight is the router's row of the chosen expert, which is probably the
    release's start), and whether all weights of the personal expert train or a low-rank update (``graft.rank``).
    Variants beyond the paper: ``graft.experts`` (k), ``graft.selection``, ``graft.layers``, ``graft.scale``,
    ``graft.start``, ``graft.gate_lr``; ``graft.place = "in_place"`` adapts the chosen expert itself, without
    a gate; ``graft.sharing = "shared"`` averages the grafted expert and its gate over clients; ``"both"`` adds a
    personal expert to the shared one. All clients start the shared expert from the pretrained expert with the
    lowest mean reconstruction loss, so each client reports its losses. With ``"both"``, the personal expert's start
    gets 0.1 % noise: two experts with equal starts would stay equal for ever.
    To keep the shared part useful alone: ``graft.dropout``; ``phases = "alternating"``, first the personal part,
    then the shared part with the personal one frozen, as in FedRep; ``pull``, a proximal term that keeps the shared
    part close to the weights that the server sent.
    To end with a personal part that fits the final shared one: ``finish``, a number of extra rounds in which all
    clients train the personal part alone on the final shared weights and send no weights. They have one cosine of
    their own, from the peak rate to 0, with the recipe's share of warm-up.
    ``aggregation = "truncated"`` averages LoRA as FlexLoRA does: the mean of the products B_i A_i by rows,
    truncated to lora.rank by an SVD. Common grafts are averaged as before. It excludes noise, robust rules and
    compression.
    """

    name = "flex"
    summary = "attention LoRA averaged; one grafted personal expert and gate per MoE layer stay on the client"
    source = "arXiv 2506.00965"
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(Method.Options):
        """Settings of the local step, of the rounds after the last one, and of the average."""

        phases: Literal["joint", "alternating"] = "joint"
        """Whether both parts train together, or the personal part first and then the shared one."""
        personal_share: float = Field(0.5, gt=0, lt=1)
        """The personal phase's share of a round's steps, if phases alternate."""
        pull: float = Field(0.0, ge=0)
        """Strength of the proximal term on the shared part."""
        finish: int = Field(0, ge=0)
        """Extra rounds after the last one, in which only the personal part trains and no weights are sent."""
        aggregation: Literal["factors", "truncated"] = "factors"
        """Whether the mean is of LoRA's factors, or of their products, truncated to the rank."""

    options: Options
    opens_to = "difference"
    moments = "kept"
    alone = "local"

    def __init__(self, options: Method.Options | None = None) -> None:
        super().__init__(options)
        self.additive = self.options.aggregation == "factors"

    def budget(self) -> str:
        """Return what ``finish`` adds."""
        if not self.options.finish:
            return ""
        return f"FedAvg's steps, and {self.options.finish} more rounds of all clients on the personal part (finish)"

    def check(self, config: RunConfig) -> None:
        """Refuse a share of no phase, and a personal phase or personal rounds if nothing is personal."""
        if self.options.phases == "joint" and "personal_share" in self.options.model_fields_set:
            raise ConfigError(
                f"method.options.personal_share = {self.options.personal_share}",
                "both parts train together with phases = 'joint'",
                "leave it out, or set method.options.phases = 'alternating'",
            )
        if config.graft.sharing != "shared":
            return
        if self.options.phases == "alternating":
            raise ConfigError(
                "method.options.phases = 'alternating'",
                "graft.sharing = 'shared' leaves nothing personal to train first",
                "set phases = 'joint', or graft.sharing = 'both'",
            )
        if self.options.finish:
            raise ConfigError(
                f"method.options.finish = {self.options.finish}",
                "graft.sharing = 'shared' leaves nothing personal to train after the last round",
                "set finish = 0, or graft.sharing = 'both'",
            )

    def extra_rounds(self, rounds: int) -> int:
        """Return ``finish``."""
        return self.options.finish

    def train(self, turn: Turn) -> TrainResult:
        """Train both parts together or in two phases; in extra rounds the personal part alone."""
        if (extra := turn.round - turn.site.config.federation.rounds) > 0:
            return turn.fit(shared=False, settings=self._finishing(turn.settings, extra))
        pull = proximal(turn.split.shared, turn.received, self.options.pull)
        hooks = StepHooks(penalty=pull, around_batch=graft_dropout(turn))
        if self.options.phases == "joint":
            return turn.fit(hooks=hooks)
        return personal_then_shared(turn, self.options.personal_share, hooks)

    def _finishing(self, settings: LocalSettings, number: int) -> LocalSettings:
        """Return the settings of an extra round, from 1: one cosine is over all of them."""
        total = self.options.finish * settings.steps
        return replace(
            settings,
            first_step=(number - 1) * settings.steps,
            total_steps=total,
            warmup_steps=round(settings.training.warmup_ratio * total),
        )

    def combine(self, server: Server, updates: Iterable[Update]) -> None:
        """Average all tensors by rows; or LoRA's products, truncated, and the other tensors by rows."""
        if self.options.aggregation == "factors":
            super().combine(server, updates)
            return
        arrived: list[tuple[int, Factors]] = []

        def noted() -> Iterator[Update]:
            for update in checked(updates):
                pairs = factors(update.tensors()).items()
                arrived.append((update.rows, {layer: (A.clone(), B.clone()) for layer, (A, B) in pairs}))
                yield update

        # The mean is taken of all tensors as they arrive; only LoRA's factors, which are small, are kept of each.
        mean = server.shared.manifest.unflatten(weighted_mean(noted()))
        total = sum(rows for rows, _ in arrived)
        weighted = [(rows / total, each) for rows, each in arrived]
        new = named(truncated_mean(weighted, factors(server.shared.tensors())))
        server.shared = Payload.of(mean | new)

    def mixes(self, config: RunConfig) -> bool:
        """Return whether there are personal experts beside the pretrained ones."""
        return config.graft.place == "beside" and config.graft.sharing != "shared"

    def mixed(self, turn: Turn, weight: float) -> AbstractContextManager[None]:
        """Return the model with a share of the personal experts' outputs."""
        return _weakened(cast(Grafts, turn.parts["graft"]), weight)


@contextmanager
def _weakened(graft: Grafts, weight: float) -> Iterator[None]:
    """Multiply the personal experts' factors c_p, which stay so: a turn's parts are built for it alone."""
    for layer in graft:
        layer.scales = tuple(weight * scale for scale in layer.scales)
    yield None


def _scales(
    scale: float | Literal["least_squares"], layers: Sequence[LayerScores], choice: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, ...]]:
    """Return every chosen expert's factor; empty if all are 1."""
    if scale == "least_squares":
        return {layer.name: coefficients(layer, choice[layer.name]) for layer in layers}
    return {} if scale == 1 else {name: (scale,) * len(indices) for name, indices in choice.items()}


def graft_dropout(turn: Turn) -> Callable[[], AbstractContextManager[object]]:
    """Return a function for the context of one batch: it disables the personal graft in a share of the batches."""
    share, graft = turn.site.config.graft.dropout, turn.parts.get("graft")
    if not share or graft is None:
        return nullcontext
    stream = turn.site.generator("graft dropout", turn.round)
    return lambda: graft.disabled() if torch.rand((), generator=stream) < share else nullcontext()
