"""FlowerTune's way (Flower's example and leaderboard template `flowertune-llm`): a client that keeps nothing.

For every train message the ClientApp loads tokenizer and base, puts LoRA into it, sets what the message holds,
builds an SFTTrainer, trains and sends the adapter back; the server is Flower's own FedAvg.

Fairness: the project runs on Flower's Ray simulation, whose cost is measured separately. Here messages go through
flexperts' in-process grid, which adds next to nothing and lets PyTorch use all cores for the one client that
works. The client's rows stay in memory between messages, as FlowerTune's do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial

from clock import Clock
from datasets import Dataset
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from trainer_per_client import adapted_model, texts, train
from transformers import AutoTokenizer
from work import Work

from flexperts.engines.grid import InProcessGrid


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, which reports its rounds to the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, weighted_by_key="rows")
        self.clock = clock

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self.clock.begin()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End it."""
        told = list(replies)
        averaged = super().aggregate_train(server_round, told)
        self.clock.end()
        for reply in told:
            self.clock.count(*(int(reply.content["metrics"][name]) for name in ("steps", "tokens")))
        return averaged


def run(work: Work, clock: Clock) -> dict[str, Tensor]:
    """Run the rounds and return the averaged adapter."""
    nodes = {number: partial(answer, work, name) for number, name in enumerate(sorted(work.clients), 1)}
    start = ArrayRecord(get_peft_model_state_dict(adapted_model(work)))
    return (
        TimedFedAvg(clock).start(InProcessGrid(nodes), start, num_rounds=work.rounds).arrays.to_torch_state_dict()
    )


@cache
def rows(work: Work, name: str) -> Dataset:
    """Return a client's rows, which stay in memory."""
    return texts(work, name)


def answer(work: Work, name: str, kind: str, content: RecordDict) -> RecordDict:
    """Train for one message."""
    number = int(content["config"]["server-round"])
    tokenizer, model = AutoTokenizer.from_pretrained(work.base), adapted_model(work)
    set_peft_model_state_dict(model, content["arrays"].to_torch_state_dict())
    steps, tokens = train(work, model, tokenizer, rows(work, name).select(work.order(name, number)), number)
    told = MetricRecord({"rows": len(rows(work, name)), "steps": steps, "tokens": tokens})
    return RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": told})
