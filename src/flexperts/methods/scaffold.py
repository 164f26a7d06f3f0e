"""SCAFFOLD: control variates that correct a client's drift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import DERIVED, Update
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.parameters.vector import Manifest, Payload, flatten
from flexperts.training.local import StepHooks, TrainResult

_CONTROL = f"{DERIVED}control."
_LAST = "last."
"""In the server's memory: the c_i that a client sent last, ``last.<client>``, a flat vector."""


class Scaffold(Method):
    """FedAvg on attention LoRA with every step corrected by control variates.

    Source: Karimireddy et al., ICML 2020 (arXiv 1910.06378), algorithm 1 with option II.
    Client i steps y <- y - eta_k (g(y) - c_i + c) from y = x, g being its clipped gradient and eta_k the rate of
    step k; then c_i' = c_i - c + (x - y) / sum_k eta_k. Server: x <- x + server_lr mean_i (y_i - x), over the
    round's participants; c <- sum_i (n_i / n) c_i over all clients. c_i is 0 before a client's first round.
    Trained: attention LoRA. Sent: LoRA and c_i' up, LoRA and c down: twice FedAvg's bytes. Aggregated: the mean by
    rows of both. Stays: nothing. Inference: the global LoRA.
    Open choices: the correction is only valid for plain SGD without weight decay, so anything else is refused. The
    paper's constant rate becomes the schedule's real rates, and K eta becomes their sum; so c_i' is the
    rate-weighted mean of the client's clipped gradients, and does not change in a round whose rates are all 0. The
    paper averages uniformly; here the mean is by rows, for x and for c. The paper's clients send c_i' - c_i, and
    its server adds them up, which is the same as long as every reply arrives and no client joins or leaves. Ours
    send c_i', and the server keeps the last one of every client: a lost reply is made good by the client's next
    one. So its checkpoint has a vector as long as the LoRA for each client.
    """

    name = "scaffold"
    summary = "FedAvg by SGD, with control variates against client drift"
    source = "Karimireddy et al., ICML 2020"
    sends = "attention LoRA and its control variates"
    additive = False

    class Options(Method.Options):
        """Settings of the server's step."""

        server_lr: float = Field(1.0, gt=0)
        """The server's learning rate; 1 takes the clients' mean."""

    options: Options

    def check(self, config: RunConfig) -> None:
        """Refuse optimizers for which the correction would be wrong."""
        rule = "scaffold's control variates are gradients of plain SGD"
        if config.training.optimizer != "sgd":
            value = f"training.optimizer = {config.training.optimizer!r}"
            raise ConfigError(value, rule, "set training.optimizer = 'sgd' and a training.lr that suits it")
        if config.training.weight_decay:
            raise ConfigError(
                f"training.weight_decay = {config.training.weight_decay:g}", rule, "set training.weight_decay = 0"
            )

    def receive(self, turn: Turn) -> None:
        """Load the global LoRA; the control variates are used in ``train``."""
        turn.load({n: t for n, t in turn.received.items() if not n.startswith(_CONTROL)})

    def train(self, turn: Turn) -> TrainResult:
        """Train with the correction, and compute the client's next control variates."""
        ours, common, own, start = turn.split.shared, {}, {}, {}
        for name, parameter in ours.items():
            start[name], common[name] = turn.received[name], turn.received[_CONTROL + name]
            own[name] = turn.memory.get(name, torch.zeros_like(parameter))

        def correct() -> None:
            for name, parameter in ours.items():
                if parameter.grad is not None:
                    parameter.grad += common[name] - own[name]

        result = turn.fit(hooks=StepHooks(correct=correct))
        for name, parameter in ours.items():
            change = (start[name] - parameter.detach()) / result.lr_sum - common[name] if result.lr_sum else 0
            turn.memory[name] = own[name] + change
            turn.derived[_CONTROL + name] = turn.memory[name]
        return result

    def start(self, server: Server) -> None:
        """Initialize the server's control variates."""
        server.memory.update({n: torch.zeros_like(t) for n, t in server.shared.tensors().items()})

    def regroup(self, server: Server) -> None:
        """Forget the control variates of clients that have left, and average those of all that are here."""
        _begin(server)
        server.forget_departed(_LAST)
        _average(server)

    def broadcast(self, server: Server, client: str) -> Payload:
        """Return the global LoRA and the server's control variates."""
        tensors = server.shared.tensors()
        return Payload.of(tensors | {_CONTROL + name: server.memory[name] for name in tensors})

    def final(self, server: Server, client: str) -> Payload:
        """Return the global LoRA alone."""
        return server.shared

    def uplink(self, server: Server, client: str) -> Manifest:
        """Declare the LoRA and the client's control variates."""
        tensors = server.shared.tensors()
        return Manifest.of(tensors | {_CONTROL + name: tensor for name, tensor in tensors.items()})

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        """Step towards the clients' mean, keep the participants' control variates, and average those of all."""
        sent: dict[str, Tensor] = {}
        mean = self.uplink(server, "").unflatten(weighted_mean(_noted(updates, sent)))
        _begin(server)
        server.memory |= sent
        _average(server)
        server.shared = replace(server.shared, vector=flatten(self._stepped(server.shared.tensors(), mean)))

    def _stepped(self, x: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.lerp(tensor, mean[name], self.options.server_lr) for name, tensor in x.items()}


def _noted(updates: Iterable[Update], sent: dict[str, Tensor]) -> Iterator[Update]:
    """Yield the updates unchanged, and note each client's control variates in ``sent``."""
    for update in updates:
        control = {n: t for n, t in update.tensors().items() if n.startswith(_CONTROL)}
        sent[_LAST + update.client] = torch.from_numpy(flatten(control))
        yield update


def _begin(server: Server) -> None:
    """In a run of an earlier version, whose server has c alone, take c as every client's until it sends its own."""
    if server.round and not any(name.startswith(_LAST) for name in server.memory):
        c = flatten({name: server.memory[name] for name in server.shared.tensors()})
        server.memory |= {_LAST + client: torch.from_numpy(c.copy()) for client in server.clients}


def _average(server: Server) -> None:
    """Set c to the mean by rows of all clients' c_i, in fp64."""
    rows, total = server.counted, torch.zeros(server.shared.size, dtype=torch.float64)
    for client in sorted(rows):
        if _LAST + client in server.memory:
            total.add_(server.memory[_LAST + client], alpha=rows[client])
    server.memory |= server.shared.manifest.unflatten((total / sum(rows.values())).float().numpy())
