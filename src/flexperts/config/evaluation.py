"""Settings of what is measured: on clients' rows, beyond them, and of comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from flexperts.config.section import Section
from flexperts.seeding import derive_seed


class EvaluationConfig(Section):
    """Scoring on rows that are not trained on."""

    split: Literal["test", "validation"] = "test"
    """Rows to score: test to report; validation to choose settings, if data.validation_fraction is above 0 or
    data.validation_rows is given."""
    rows: int | None = Field(None, ge=1)
    """Number of rows per client that are scored; without it, all."""
    clients: int | None = Field(None, ge=1)
    """Number of clients that are scored, drawn by name: the same in every round, method, seed; without it, all."""
    every: int | None = Field(None, ge=1)
    """Evaluate after every this many rounds; without it, after the last round only, which is always evaluated."""
    answers: Literal["always", "last"] = "always"
    """Generate answers in every evaluated round, or in the last one only; NLL is always taken."""
    others_rows: int = Field(0, ge=0)
    """Rows of every other client on which a client's model is scored after the last round (in one process only)."""
    routing_rows: int = Field(0, ge=0)
    """Rows per client whose routing is recorded at every evaluation; 0 = none."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated answer; without it, the smallest power of two that holds the longest train response."""
    batch_size: int = Field(32, ge=1)
    """Rows per forward pass and generated batch."""

    def scored(self, clients: Iterable[str]) -> list[str]:
        """Return the clients to score, sorted; names alone decide, so rounds, methods and seeds agree."""
        return sorted(sorted(clients, key=lambda name: derive_seed(0, "evaluated", name))[: self.clients])


class FloorConfig(Section):
    """At the end each client keeps the simplest model that is about as good as its best one on validation rows."""

    candidates: tuple[Literal["global", "local", "personalized", "mixture"], ...] = Field(
        ("global", "personalized", "mixture"), min_length=1
    )
    """Models that are compared with the untouched base, if the method has them. local = trained on the client's
    rows alone, a second training. It takes as many steps as a client takes on average: those of rounds x
    participation and of finish. Rounds of a warm-up count whole. With ditto, feddpa_t and feddpa_f, whose clients
    train two models, it takes twice as many. A newcomer's takes the steps of its personal part, or of a
    participant."""
    local_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the local candidate; without it training.personal_lr, or training.lr."""

    @model_validator(mode="after")
    def _rate_of_a_candidate(self) -> Self:
        if self.local_lr is not None and "local" not in self.candidates:
            raise ValueError(
                f"local_lr = {self.local_lr} is for a candidate that is missing: add 'local' to candidates"
            )
        return self


class KnowledgeConfig(Section):
    """What the models can do beyond the clients' tasks, measured after the last round; nothing by default."""

    general: str | None = None
    """File or hub:org/name[:split] of tasks that no client trains on."""
    general_rows: int | None = Field(None, ge=1)
    """How many of its first rows are scored; without it, all."""
    mmlu: str | None = None
    """Folder with MMLU as dev.jsonl and test.jsonl, or "hub" to read it from the hub."""
    mmlu_questions: int | None = Field(200, ge=1)
    """Number of questions, drawn evenly over the subjects."""
    mmlu_shots: int = Field(0, ge=0, le=5)
    """Solved questions shown before each question."""


class CompareConfig(Section):
    """What `flexperts compare` runs; a single run does not use it."""

    entries: tuple[str, ...] = ()
    """Methods and variants, in the order of the table; "all" = every method that the list does not name; empty =
    the recipe's own method and its reference."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of a variant -> settings (KEY=VALUE) on top of the recipe's; name of a method -> settings it needs."""
    seeds: int = Field(3, ge=1)
    """Number of seeds (0, 1, ...) with which every entry runs."""
    reference: str | None = None
    """Entry with which the others are compared; without it, the first one."""
    newcomers: tuple[str, ...] = ()
    """Clients of the recipe's data that take no part in any run; they join each finished run, and are scored."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    resamples: int = Field(100_000, ge=100)
    """Number of bootstrap resamples."""

    @model_validator(mode="after")
    def _names_can_be_listed(self) -> Self:
        if odd := [name for name in self.variants if "," in name or name.strip() in ("", "all")]:
            raise ValueError(f'variant {odd[0]!r}: a name holds no comma, is not empty and not "all"')
        return self
