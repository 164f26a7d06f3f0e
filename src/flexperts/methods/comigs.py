"""CoMiGS: a shared and a personal expert per MoE layer; their router learns on rows that the experts do not see."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from flexperts.data.prompts import Example
from flexperts.methods.kit.local_steps import balanced
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.turn import Site, Turn
from flexperts.modeling.lora import SHARED_PREFIX
from flexperts.parts.gated_adapters import GatedAdapters
from flexperts.parts.part import Part
from flexperts.training.local import LocalSettings, Objective, TrainResult, joined

_PART, _STEPS = "gated", "steps"


class CoMiGS(Method):
    """A generalist and a specialist expert per MoE layer; the router is the upper level of a bi-level problem.

    Source: CoMiGS (arXiv 2409.13931).
    y = MoE(x) + a_0(x) G(x) + a_1(x) F(x), a(x) = softmax(W x) in R^2; G, F = (alpha / r) up(down(x)).
    theta = attention LoRA, G, F: steps on L_train(theta, W); after every ``router_every`` of them,
    W: ``router_steps`` steps on L_validation(theta, W).  L = response NLL + ``balance`` * mean over layers of
    sum_e f_e P_e / t_e; P_e = mean of a_e(x), f_e = share of tokens whose larger weight is a_e,
    t = (target, 1 - target).  G <- sum_i p_i G_i, and the same for attention LoRA; p_i = n_i / n.
    Trained: attention LoRA, G and F on train rows, the router on validation rows. Sent: attention LoRA and G.
    Aggregated: mean by rows. Stays: F and the router. Inference: personalized = global LoRA and G with own F and
    router; global = global LoRA with G at weight 1.
    Open choices: the source's base is dense, and its expert is the FFN with a LoRA on both of its matrices; here
    the site is the MoE layer's output, as in pfedmoe_style: the pair's output is added to the routed output. The
    validation rows are set aside from the client's train rows, always the same ones; n_i and a round's steps count
    all of them. The router's steps come on top of ``training.local_steps``; they are in the reply's steps and
    tokens, and their loss is not in its mean. A client with one row uses it for both. Steps count over the rounds
    in which the client trains; if it has fewer than ``router_every``, its router keeps its start, which is the same
    on all clients. A new optimizer starts after each update of the router, as it does in each round. The router's
    rate is ``training.personal_lr``, with one cosine over all of its steps (the source: constant). The source's f_e
    counts chosen experts, and of two it chooses both: f_e = 1/2, and at target 0.5 its balance loss is the constant
    1, without gradient, as with ``balance = 0`` here. Padding counts in it. The global state has G at weight 1,
    although training weights it by a_0 < 1.
    """

    name = "comigs"
    summary = "a shared and a personal expert per MoE layer; their router learns on rows kept from training"
    source = "CoMiGS, arXiv 2409.13931"
    sends = "attention LoRA and shared low-rank expert of every MoE layer"
    keeps = "personal low-rank expert and router of every MoE layer"
    needs_experts = True
    budget_note = (
        "FedAvg's steps, and router_steps ({router_steps}) of the router on top after every router_every of them "
        "({router_every}); the experts never see the share of the train rows that the router trains on "
        "(validation, {validation})"
    )
    states: ClassVar[tuple[State, ...]] = ("zero_shot", "global", "personalized")

    class Options(Method.Options):
        """Experts, and the router's updates."""

        rank: int = Field(8, ge=1)
        """r of both experts."""
        alpha: float = Field(16.0, gt=0)
        """Scaling numerator: an expert's output is multiplied by alpha / r."""
        router_every: int = Field(30, ge=1)
        """Steps of the experts between two updates of the router, counted over rounds."""
        router_steps: int = Field(10, ge=1)
        """Steps of an update of the router."""
        validation: float = Field(0.1, gt=0, lt=1)
        """Share of the train rows that only the router trains on; at least one row."""
        balance: float = Field(0.01, ge=0)
        """Weight of the balance loss."""
        target: float = Field(0.5, gt=0, lt=1)
        """Share of the shared expert that the balance loss aims at."""

    options: Options

    def parts(self, site: Site) -> dict[str, Part]:
        """Return a pair with a linear router for every MoE layer."""
        rank, alpha, stream = self.options.rank, self.options.alpha, site.common_generator("comigs")
        pairs = GatedAdapters(
            site.experts,
            rank=rank,
            alpha=alpha,
            gate_width=None,
            generator=stream,
            dropout=site.config.lora.dropout,
        )
        return {_PART: pairs}

    def shared(self, names: Collection[str]) -> set[str]:
        """Return the names of attention LoRA and G's parameters."""
        return {name for name in names if name.startswith(SHARED_PREFIX) or name.split(".")[-2] == "shared"}

    def train(self, turn: Turn) -> TrainResult:
        """Train the experts, and the router after every ``router_every`` steps of all rounds."""
        return self._alternate(turn, shared=True)

    def personalize(self, turn: Turn) -> TrainResult:
        """Do the same with the shared parameters frozen."""
        return self._alternate(turn, shared=False)

    def _alternate(self, turn: Turn, *, shared: bool) -> TrainResult:
        rows, validation = self.sides(turn.site)
        settings, every = turn.settings, self.options.router_every
        results, routers = list[TrainResult](), list[TrainResult]()
        first = count = int(turn.memory.get(_STEPS, 0))
        last, end = first + settings.steps, time.monotonic() + (settings.seconds or 0.0)

        def left(its: LocalSettings) -> LocalSettings:
            """All phases of a turn share its seconds."""
            return its if its.seconds is None else replace(its, seconds=max(0.0, end - time.monotonic()))

        with self._balanced(turn) as objective:
            while count < last and (not results or left(settings).seconds != 0.0):
                steps = min(every - count % every, last - count)
                part = replace(settings, steps=steps, first_step=settings.first_step + count - first)
                results.append(
                    turn.fit(
                        shared=shared,
                        trains=lambda name: not _is_router(name),
                        examples=rows,
                        settings=left(part),
                        objective=objective,
                    )
                )
                count += results[-1].steps
                if count % every == 0:
                    # Its place among all of the run's steps, also for a client that has missed rounds.
                    place = (settings.first_step + count - first) // every
                    part = left(self._router_settings(settings, max(0, place - 1)))
                    fit = turn.fit(
                        shared=False, trains=_is_router, examples=validation, settings=part, objective=objective
                    )
                    routers.append(fit)
        turn.memory[_STEPS] = torch.tensor(count)
        whole = joined(*results, *routers)
        return replace(whole, loss=joined(*results).loss)

    def sides(self, site: Site) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return the rows for the experts and those for the router."""
        rows = site.examples
        order = torch.randperm(len(rows), generator=site.generator("validation")).tolist()
        count = max(1, min(round(self.options.validation * len(rows)), len(rows) - 1))
        return [rows[i] for i in sorted(order[count:])] or rows, [rows[i] for i in sorted(order[:count])]

    def _router_settings(self, settings: LocalSettings, done: int) -> LocalSettings:
        """Return the settings of an update of the router after ``done`` others."""
        steps, total = self.options.router_steps, max(done + 1, settings.total_steps // self.options.router_every)
        warmup = round(settings.warmup_steps * steps * total / max(1, settings.total_steps))
        return replace(
            settings, steps=steps, first_step=done * steps, total_steps=total * steps, warmup_steps=warmup
        )

    @contextmanager
    def _balanced(self, turn: Turn) -> Iterator[Objective]:
        """Yield the turn's objective with the balance loss in its gradient."""
        if self.options.balance == 0:
            yield turn.objective
            return
        shares = Shares(self.options.target)
        with shares.watching(cast(GatedAdapters, turn.parts[_PART])):
            yield balanced(turn.objective, shares, self.options.balance)


def _is_router(name: str) -> bool:
    return name.endswith(".gate.W")


@dataclass
class Shares:
    """The routers' weights ``[T, 2]`` in the last forward pass, by gate.

    Args:
        target: The shared expert's target share of the tokens.
    """

    target: float
    weights: dict[nn.Module, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, pairs: GatedAdapters) -> Iterator[None]:
        """Record the weights inside the block."""
        with ExitStack() as stack:
            for pair in pairs:
                stack.callback(pair.gate.register_forward_hook(self._record).remove)
            yield

    def _record(self, gate: nn.Module, _args: object, weights: Tensor) -> None:
        self.weights[gate] = weights

    def balance_loss(self) -> Tensor:
        """Return the mean over layers of sum_e f_e P_e / t_e, which is 1 where f = P = t; forget the weights."""
        losses = []
        for weights in self.weights.values():
            flat = weights.float().flatten(0, -2)
            chosen = nn.functional.one_hot(flat.argmax(-1), 2).float().mean(0)
            wanted = flat.new_tensor([self.target, 1 - self.target])
            losses.append((chosen * flat.mean(0) / wanted).sum())
        self.weights = {}
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
