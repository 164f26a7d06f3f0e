"""A run as one frozen value: what a recipe (TOML) holds. Every default stands here and nowhere else."""

from __future__ import annotations

from typing import Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The pretrained MoE that every client starts from."""

    base: str = "smol-moe"
    """A shipped base's name, a local transformers folder, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of the frozen weights."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the matrix products (autocast); trained weights are always fp32."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt template: auto = the tokenizer's chat template where it has one, else alpaca."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


class LoraConfig(Section):
    """LoRA on the attention projections: the shared part."""

    rank: int = Field(8, ge=1)
    """r."""
    alpha: float = Field(16.0, gt=0)
    """Scaling numerator."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on LoRA's input."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Last names of the attention Linear layers to adapt; empty = every one that the rule finds."""


class GraftConfig(Section):
    """The personal experts."""

    experts: int = Field(1, ge=1)
    """k, personal experts per MoE layer."""
    rank: int | Literal["full"] = "full"
    """LoRA rank of the personal experts, or "full" for trainable copies."""
    alpha: float = Field(16.0, gt=0)
    """LoRA scaling numerator of the personal experts."""
    gate_bias: float = 0.0
    """Start of the gate's logit; 0 opens it half."""
    calibration_rows: int = Field(64, ge=1)
    """Train rows whose tokens the selection reads."""
    calibration_tokens: int = Field(4096, ge=1)
    """Token budget of the selection, per layer."""

    @model_validator(mode="after")
    def _positive_rank(self) -> Self:
        if self.rank != "full" and self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1 or 'full'")
        return self


class SilosConfig(Section):
    """The silo data that ships, made on the fly."""

    seed: int = 0
    """Seed of the generator."""
    train_rows: int = Field(96, ge=4)
    """Train rows per silo."""
    test_rows: int = Field(40, ge=4)
    """Test rows per silo."""


class ClientFiles(Section):
    """One client's own data."""

    train: str
    """File (.jsonl, .json, .csv, .parquet) or hub:org/name[:split]."""
    test: str | None = None
    """Test file; without it, data.test_fraction of the passages is held out."""


class DataConfig(Section):
    """Who has which rows: exactly one of silos, folder, clients."""

    silos: SilosConfig | None = None
    """The shipped silos."""
    folder: str | None = None
    """A folder with one sub-folder per client that holds train.jsonl and test.jsonl."""
    clients: dict[str, ClientFiles] = {}
    """Client name -> its files."""
    columns: dict[str, str] = {}
    """Field (instruction, context, response, category) -> column, where it is named otherwise."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of passages held out where a client has no test file."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [n for n in ("silos", "folder", "clients") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of silos, folder, clients (now: {', '.join(given) or 'none'})")
        if unknown := set(self.columns) - {"instruction", "context", "response", "category"}:
            raise ValueError(f"columns maps {sorted(unknown)}; fields are instruction, context, response, category")
        return self


class MethodConfig(Section):
    """The federated method."""

    name: str = "flex"
    """See `flexperts methods`."""
    reference: str | None = None
    """A second method, run with the same budget and seed and reported beside the first."""


class TrainingConfig(Section):
    """The local step of every client."""

    local_steps: int | None = Field(None, ge=1)
    """Optimizer steps per round; without it, local_epochs counts."""
    local_epochs: float = Field(1.0, gt=0)
    """Passes over the client's rows per round."""
    batch_size: int = Field(4, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass; gradients accumulate to batch_size. Lower it to save memory."""
    max_length: int = Field(512, ge=16)
    """Longest example in tokens."""
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


class FederationConfig(Section):
    """The rounds."""

    rounds: int = Field(3, ge=1)
    """Rounds; every client takes part in each."""


class EvaluationConfig(Section):
    """Scoring on the clients' test rows."""

    rows: int | None = Field(None, ge=1)
    """Test rows per client that are scored; without it, all."""
    every: int | None = Field(None, ge=1)
    """Evaluate after every so many rounds; the last round is always evaluated."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest generated answer."""
    batch_size: int = Field(20, ge=1)
    """Rows per forward pass and generated batch."""


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
    evaluation: EvaluationConfig = EvaluationConfig()

    def to_toml(self) -> str:
        """Return the complete run as TOML, defaults written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    def with_method(self, name: str) -> RunConfig:
        """Return the same run with another method and no reference."""
        return self.model_copy(update={"method": MethodConfig(name=name)})
