"""A run as one frozen value: what a recipe (TOML) holds. Defaults are defined only in this package."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from flexperts.config.data import DataConfig
from flexperts.config.evaluation import CompareConfig, EvaluationConfig, FloorConfig, KnowledgeConfig
from flexperts.config.federation import CompressionConfig, FederationConfig, PrivacyConfig
from flexperts.config.model import GraftConfig, LoraConfig, ModelConfig
from flexperts.config.section import FreeSettings, Section

_BEFORE = {"graft": {"output": "expert"}, "training": {"personal_moments": "fresh"}}
"""What versions did that had no setting for it, where the present default is another."""


class MethodConfig(Section):
    """The federated method."""

    name: str = "flex"
    """Name of a method; `flexperts methods` lists them."""
    options: FreeSettings = Field(default_factory=dict)
    """The method's own settings, such as FedProx's mu; see docs/methods.md."""
    reference: str | None = None
    """A second method for comparison, run with the same budget and seed, and with its default options."""


class TrainingConfig(Section):
    """The local step of every client."""

    objective: Literal["next_token", "dpo"] = "next_token"
    """Loss of the local step: next_token = NLL of the response; dpo = direct preference optimization on rows with a
    chosen and a rejected answer, with the untouched base as reference model (docs/preferences.md)."""
    dpo_beta: float = Field(0.1, gt=0)
    """With objective "dpo", the factor of the log-ratios to the base; higher keeps the model closer to the base."""
    local_steps: int | None = Field(None, ge=1)
    """Optimizer steps per round; without it, local_epochs decides."""
    local_epochs: float = Field(1.0, gt=0)
    """Passes over the client's rows per round."""
    local_seconds: float | None = Field(None, gt=0)
    """Seconds that a client trains in a round: at least one step, at most the steps above. Updates then count per
    step (docs/slow-silos.md). On one machine a step takes federation.step_seconds, on a silo what it takes."""
    batch_size: int = Field(4, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass; gradients accumulate to batch_size. Lower it to save memory."""
    max_length: int = Field(512, ge=16)
    """Longest example in tokens."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local step; sgd has no momentum."""
    personal_moments: Literal["auto", "fresh", "kept"] = "auto"
    """AdamW's moments of the personal parameters: fresh = a new optimizer in every round, as for the shared ones;
    kept = they stay with the personal state from round to round (needs optimizer "adamw"); auto = kept for the
    method flex, if the optimizer has moments, else fresh."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate of the shared parameters."""
    personal_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the personal parameters; without it, lr."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the run's steps that warm up linearly; a cosine follows, over all rounds."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping threshold."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    @model_validator(mode="after")
    def _moments_exist(self) -> Self:
        if self.personal_moments == "kept" and self.optimizer != "adamw":
            raise ValueError(f"personal_moments = 'kept' needs optimizer = 'adamw', not {self.optimizer!r}")
        return self

    def moments(self, preferred: Literal["fresh", "kept"]) -> Literal["fresh", "kept"]:
        """Return what becomes of personal moments: the setting, or what a method prefers where there are any."""
        if self.personal_moments != "auto":
            return self.personal_moments
        return preferred if self.optimizer == "adamw" else "fresh"

    @property
    def rows_per_pass(self) -> int:
        """Rows per forward pass."""
        return self.micro_batch_size or self.batch_size

    def steps_per_round(self, rows: int) -> int:
        """Return a client's optimizer steps per round: ``local_steps`` if given, else the steps of its epochs."""
        return self.local_steps or max(1, math.ceil(self.local_epochs * math.ceil(rows / self.batch_size)))


class EngineConfig(Section):
    """How this machine computes a run. It is not in the run's record: a resumed run may have another."""

    kind: Literal["in-process", "ray"] = "in-process"
    """Where clients take their turns: on this machine, or in actors of Ray, each with a base of its own."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Processes in which clients take their turns side by side, on one copy of the base; with 1, this process. auto
    starts one per core or card, as many as there are clients in a round and as memory allows."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a turn; by default the cores are divided among the workers. Results depend on it in their last
    bits, and not on the number of workers."""
    devices: tuple[str, ...] = ()
    """Devices of the workers in turn, such as cuda:0 and cuda:1; by default all cards, or the CPU without cards."""

    @model_validator(mode="after")
    def _ray_chooses(self) -> Self:
        if self.kind == "ray" and self.devices:
            raise ValueError("with engine.kind = 'ray', Ray gives each actor a card: leave engine.devices out")
        return self


class RunConfig(Section):
    """A run, whole."""

    seed: int = 0
    """Seed of every random stream of the run."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    graft: GraftConfig = GraftConfig()
    data: DataConfig
    method: MethodConfig = MethodConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    compression: CompressionConfig = CompressionConfig()
    protections: dict[str, FreeSettings] = Field(default_factory=dict)
    """Defences of installed packages, by name, with their settings; see docs/privacy.md."""
    evaluation: EvaluationConfig = EvaluationConfig()
    floor: FloorConfig | None = None
    """Whether clients end with the best of their models; without this section they do not choose."""
    knowledge: KnowledgeConfig = KnowledgeConfig()
    compare: CompareConfig = CompareConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _validation_exists(self) -> Self:
        held, scored = self.data.validation_fraction or self.data.validation_rows, self.evaluation.split
        if scored == "validation" and not held:
            raise ValueError(
                "evaluation.split = 'validation' needs data.validation_fraction above 0, or data.validation_rows"
            )
        if self.floor and not held:
            raise ValueError("[floor] compares models on validation rows: set data.validation_rows, such as 32")
        if self.floor and scored == "validation":
            raise ValueError("[floor] chooses by validation rows, so they cannot be reported: score the test rows")
        return self

    def to_toml(self) -> str:
        """Return the complete run as TOML, defaults written out.

        ``compare``, ``engine`` and the device are left out: they decide no result, or belong to a machine.
        """
        written = self.model_dump(exclude_none=True, mode="json", exclude={"compare", "engine"})
        del written["model"]["device"]
        return tomli_w.dumps(written)

    def as_begun(self, begun: RunConfig) -> RunConfig:
        """Return the same run with what it leaves open as it was when the run began."""
        graft, training = self.graft, self.training
        if graft.output == "auto":
            graft = graft.model_copy(update={"output": begun.graft.output})
        if training.personal_moments == "auto":
            training = training.model_copy(update={"personal_moments": begun.training.personal_moments})
        same = self.model_copy(update={"graft": graft, "training": training})
        return same.with_choices(template_date=begun.model.template_date)

    def with_choices(self, template_date: str | None = None, max_new_tokens: int | None = None) -> RunConfig:
        """Return the same run with what was chosen in the place of what it leaves open."""
        model, evaluation = self.model, self.evaluation
        if model.template_date is None:
            model = model.model_copy(update={"template_date": template_date})
        if evaluation.max_new_tokens is None:
            evaluation = evaluation.model_copy(update={"max_new_tokens": max_new_tokens})
        return self.model_copy(update={"model": model, "evaluation": evaluation})

    def with_method(self, name: str) -> RunConfig:
        """Return the same run with another method and no reference."""
        return self.model_copy(update={"method": MethodConfig(name=name)})


def as_recorded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe's sections, with what its version did where that version had no setting for it.

    Every version writes out all its settings, so a setting that is not there did not exist.

    Args:
        tree: The sections of a recipe that ``RunConfig.to_toml`` wrote, in this version or an earlier one.
    """
    sections = {name: tree.get(name, {}) for name in _BEFORE}
    return {**tree, **{n: {**_BEFORE[n], **its} for n, its in sections.items() if isinstance(its, Mapping)}}


def as_written_now(recipe: str) -> str:
    """Return a recorded recipe's TOML as ``RunConfig.to_toml`` writes it now; other text is returned unchanged.

    A version that adds a setting writes what earlier ones did, and earlier ones wrote the device.
    """
    try:
        return RunConfig.model_validate(as_recorded(tomllib.loads(recipe))).to_toml()
    except ValueError:
        return recipe
