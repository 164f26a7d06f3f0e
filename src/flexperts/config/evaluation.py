"""Settings of what is measured: on clients' rows, beyond them, and of comparisons."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from flexperts.config.section import Section


class EvaluationConfig(Section):
    """Scoring on rows that are not trained on."""

    split: Literal["test", "validation"] = "test"
    """Rows that are scored: validation to choose settings by, test to report."""
    rows: int | None = Field(None, ge=1)
    """Rows per client that are scored; without it, all."""
    clients: int | None = Field(None, ge=1)
    """Clients that are scored, drawn by their names: the same in every round, method and seed; without it, all."""
    every: int | None = Field(None, ge=1)
    """Evaluate after every so many rounds; the last round is always evaluated."""
    answers: Literal["always", "last"] = "always"
    """Generate answers in every evaluated round, or in the last one only; NLL is always taken."""
    others_rows: int = Field(0, ge=0)
    """Rows of every other client that a client's model is scored on in the end (clients in one process only)."""
    routing_rows: int = Field(0, ge=0)
    """Rows per client whose routing is described at every evaluation; 0 = none."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated answer; without it, the smallest power of two that holds the longest train response."""
    batch_size: int = Field(32, ge=1)
    """Rows per forward pass and generated batch."""


class KnowledgeConfig(Section):
    """What the models can do beyond the clients' tasks, measured after the last round; nothing by default."""

    general: str | None = None
    """File or hub:org/name[:split] of tasks that no client trains on."""
    general_rows: int | None = Field(None, ge=1)
    """Its first rows that are scored; without it, all."""
    mmlu: str | None = None
    """Folder with MMLU as dev.jsonl and test.jsonl, or "hub"."""
    mmlu_questions: int | None = Field(200, ge=1)
    """Questions, drawn evenly over subjects; without it, all."""
    mmlu_shots: int = Field(0, ge=0, le=5)
    """Solved questions before each one."""


class CompareConfig(Section):
    """What `flexperts compare` runs beside each other; a single run has no use for it."""

    entries: tuple[str, ...] = ()
    """Methods and variants, in the order of the table ("all" = every method not named beside it); empty = the
    recipe's own method and its reference."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name -> settings (KEY=VALUE) on top of the recipe; under a method's name, what that method needs."""
    seeds: int = Field(3, ge=1)
    """Seeds 0, 1, ... that every entry runs with."""
    reference: str | None = None
    """Entry that the others are compared with; without it, the first one."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples."""

    @model_validator(mode="after")
    def _names_can_be_listed(self) -> Self:
        if odd := [name for name in self.variants if "," in name or name.strip() in ("", "all")]:
            raise ValueError(f'variant {odd[0]!r}: a name holds no comma, is not empty and not "all"')
        return self
