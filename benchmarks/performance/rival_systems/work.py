"""The work that every system does: the same clients, rows, batches, LoRA, optimizer and number of steps."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from flexperts.config.run import RunConfig
from flexperts.data.batches import training_batches
from flexperts.data.clients import Clients, load_clients
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.seeding import generator
from flexperts.smol_moe.build import resolve_base

BASE, STEPS, BATCH = "smol-moe", 2, 2
TRAIN_ROWS, TEST_ROWS = 16, 4


class Work:
    """What one system does with some clients.

    Args:
        folder: ``silos/SEED/NAME`` in it hold the rows.
        clients: How many take part.
        rounds: How many rounds are measured. The run that the schedule is made for has one more: flexperts scores
            the last one, and scoring is no part of the work.
        method: Of flexperts; the rivals do what its ``fedavg`` does.
        workers: Of flexperts.
    """

    def __init__(
        self, folder: Path, clients: int, rounds: int, method: str = "fedavg", workers: int | str = 1
    ) -> None:
        found = sorted(path.parent for path in (folder / "silos").glob("*/*/train.jsonl"))[:clients]
        self.rounds, self.base = rounds, str(resolve_base(BASE))
        self.config = RunConfig.model_validate(
            {
                "model": {"base": BASE},
                "data": {"clients": {f"{path.name}-{path.parent.name}": _files(path) for path in found}},
                "method": {"name": method},
                "engine": {"workers": workers},
                "training": {"local_steps": STEPS, "batch_size": BATCH},
                "federation": {"rounds": rounds + 1, "min_clients": clients, "deadline": 600},
            }
        )

    @cached_property
    def clients(self) -> Clients:
        """Every client's rows."""
        return load_clients(self.config.data, self.config.seed)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """What makes tokens of rows."""
        return PromptEncoder(AutoTokenizer.from_pretrained(self.base))

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """Every client's train rows, encoded."""
        return {name: self.encoder.encode_all(rows.train) for name, rows in self.clients.items()}

    def batches(self, name: str, number: int) -> list[list[Example]]:
        """Return a client's batches of a round, as flexperts draws them."""
        stream = generator(self.config.seed, name, number, "batches")
        return list(training_batches(self.examples[name], BATCH, STEPS, stream))

    def order(self, name: str, number: int) -> list[int]:
        """Return the places of those batches' rows among the client's train rows."""
        places = {id(example): place for place, example in enumerate(self.examples[name])}
        return [places[id(example)] for batch in self.batches(name, number) for example in batch]

    def optimizer(self, model: nn.Module, number: int) -> tuple[Optimizer, LRScheduler]:
        """Return a new AdamW, and the cosine at the place where the earlier rounds ended."""
        training = self.config.training
        group: dict[str, Any] = {"params": [p for p in model.parameters() if p.requires_grad]}
        group |= {"lr": training.lr, "initial_lr": training.lr}
        optimizer = AdamW([group], weight_decay=training.weight_decay, fused=True)
        done, total = (number - 1) * STEPS, (self.rounds + 1) * STEPS
        return optimizer, get_cosine_schedule_with_warmup(optimizer, 0, total, last_epoch=done - 1)


def _files(folder: Path) -> dict[str, str]:
    return {side: str(folder / f"{side}.jsonl") for side in ("train", "test")}
