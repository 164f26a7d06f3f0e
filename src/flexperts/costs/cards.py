"""Which storage of the experts, rank and batch fit a card of a given size, from a model's config alone.

Nothing is allocated and no card is needed. Margins that depend on a card are assumptions, named below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from accelerate.utils import convert_file_size_to_int

from flexperts.config.run import RunConfig
from flexperts.costs.activations import Activations, Lengths
from flexperts.costs.models import describe, meta_base
from flexperts.costs.plan import MethodPlan, model_facts, plan_method
from flexperts.costs.preflight import PROCESS, phases
from flexperts.errors import ConfigError
from flexperts.modeling.quantization import planned_bytes
from flexperts.moe.quantized import Scheme
from flexperts.recipe import parse_recipe

CONTEXT = 1_000_000_000
"""Bytes of the card that CUDA's context, its kernels and cuBLAS's workspaces take: an assumption."""
FRAGMENTATION = 0.1
"""Share of all memory besides the base that torch's allocator reserves without using it: an assumption."""
BATCHES = (32, 16, 8, 4, 2, 1)
"""Rows that are tried, in one pass of training and in evaluation."""
RANKS = ("full", "32")
"""Ranks of personal experts that are planned: whole ones, and low-rank ones."""
Storage = Literal["bf16", "int8", "nf4"]


def card_bytes(text: str) -> int:
    """Return the bytes of a card's memory, such as ``24GB`` (10^9) or ``80GiB`` (2^30).

    Raises:
        ConfigError: It is no size, or not larger than the margin.
    """
    try:
        size = int(convert_file_size_to_int(text.replace(" ", "")))
    except ValueError:
        size = 0
    if size <= CONTEXT:
        raise ConfigError(
            f"--gpu {text}", "it must be a size above 1 GB", "write it in a form such as 24GB or 80GiB"
        )
    return size


@dataclass(frozen=True)
class Fit:
    """One storage and rank on a card.

    Args:
        storage: How routed experts are stored.
        rank: Rank of personal experts.
        base: Bytes of the frozen base.
        rows: Most rows in one pass of training; 0 if not even one fits.
        checkpointing: Whether gradient checkpointing is needed for one row.
        evaluation_rows: Most rows that are evaluated together; 0 if not even one fits.
        training: Bytes in training with so many rows, margins included; with one row if none fits.
        evaluation: The same in evaluation.
        loading: Bytes while the base is loaded: its largest tensor is there three times, as it is read, joined and
            stored.
        host: Bytes of the machine's memory: the process, the personal state as it is read, copied and written, and
            the shared weights in three vectors. Pages of the checkpoint, which the system can drop, come on top.
    """

    storage: Storage
    rank: str
    base: int
    rows: int
    checkpointing: bool
    evaluation_rows: int
    training: int
    evaluation: int
    loading: int
    host: int

    @property
    def name(self) -> str:
        """The storage of the experts, for tables."""
        return self.storage

    def on(self, card: int) -> bool:
        """Return whether training, evaluation and loading fit a card of so many bytes."""
        return self.rows > 0 and self.evaluation_rows > 0 and self.loading <= card


class CardPlanner:
    """Planner of one model on cards of any size.

    Args:
        model: As for ``describe``.
        settings: Overrides of a recipe's defaults.
        ranks: Ranks of personal experts; a method without personal parameters has the first one only.
    """

    def __init__(self, model: str, settings: Iterable[str] = (), ranks: Sequence[str] = RANKS) -> None:
        given, description = list(settings), describe(model)
        self._base = meta_base(description, "bfloat16")
        self.facts = model_facts(description, self._base)
        self._planned: dict[str, tuple[RunConfig, MethodPlan]] = {}
        for rank in ranks:
            config = parse_recipe("data.silos = {}", [*given, "model.dtype=bfloat16", f"graft.rank={rank}"])
            self._planned[rank] = config, plan_method(self._base, self.facts, config, ["a", "b"], bandwidth=1.0)
            if not self._planned[rank][1].personal:
                break
        self.max_length = next(iter(self._planned.values()))[0].training.max_length

    def fits(self, card: int) -> Iterator[Fit]:
        """Yield every storage and rank on a card of so many bytes."""
        for rank, (config, planned) in self._planned.items():
            for storage in get_args(Storage):
                scheme: Literal["none"] | Scheme = "none" if storage == "bf16" else storage
                yield self._fit(card, storage, rank, planned_bytes(self._base.model, scheme), config, planned)

    def _fit(
        self, card: int, storage: Storage, rank: str, base: int, config: RunConfig, planned: MethodPlan
    ) -> Fit:
        tried = [(rows, False) for rows in BATCHES] + [(rows, True) for rows in BATCHES]
        needs = {each: self._need(config, planned, base, *each) for each in tried}
        (rows, checkpointing), (training, _) = next(
            ((each, need) for each, need in needs.items() if need[0] <= card), ((0, True), needs[1, True])
        )
        evaluated = {rows: self._need(config, planned, base, rows, True)[1] for rows in BATCHES}
        together = next((rows for rows, need in evaluated.items() if need <= card), 0)
        largest = max(p.numel() * torch.bfloat16.itemsize for p in self._base.model.parameters())
        return Fit(
            storage=storage,
            rank=rank,
            base=base,
            rows=rows,
            checkpointing=checkpointing,
            evaluation_rows=together,
            training=training,
            evaluation=evaluated[together or 1],
            loading=CONTEXT + base + 2 * largest,
            host=PROCESS + 3 * planned.personal_state + 12 * planned.shared,
        )

    def _need(
        self, config: RunConfig, planned: MethodPlan, base: int, rows: int, checkpointing: bool
    ) -> tuple[int, int]:
        """Return the bytes of training, or of the selection before it, and of evaluation, margins included."""
        training = config.training.model_copy(
            update={"batch_size": rows, "micro_batch_size": None, "gradient_checkpointing": checkpointing}
        )
        evaluation = config.evaluation.model_copy(update={"batch_size": rows})
        config = config.model_copy(update={"training": training, "evaluation": evaluation})
        lengths = Lengths(training.max_length, training.max_length // 2)
        passing = Activations(self._base.model, config, lengths, self.facts.experts_per_token)
        found = {need.phase: need for need in phases(base, planned, passing, config, torch.device("cuda"))}
        margin = {
            name: round(need.total + CONTEXT + FRAGMENTATION * (need.total - base)) for name, need in found.items()
        }
        return max(margin["training"], margin.get("selection", 0)), margin["evaluation"]
