"""A run as one frozen value: what a recipe (TOML) holds. Every default stands here and nowhere else."""

from __future__ import annotations

from typing import Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


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
    selection: Literal[
        "reconstruction", "scaled", "frequency", "router_weight", "random", "greedy", "exhaustive"
    ] = "reconstruction"
    """Rule that picks the experts to graft; the method's own is reconstruction."""
    layers: tuple[int, ...] = ()
    """MoE layers that get a graft, counted from 0, negative from the end; empty = all."""
    scale: float | Literal["least_squares"] = 1.0
    """Factor on a personal expert's output; least_squares = the coefficients that best rebuild the routed output
    from the chosen experts."""
    place: Literal["beside", "in_place"] = "beside"
    """beside = one expert more, with a gate; in_place = the chosen expert itself is adapted, no gate."""
    sharing: Literal["personal", "shared", "both"] = "personal"
    """Who owns the grafted expert: the client, the federation (averaged), or one each."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training batches without the graft, so that the shared part learns to stand alone."""

    @model_validator(mode="after")
    def _positive_rank(self) -> Self:
        if self.rank != "full" and self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1 or 'full'")
        return self

    @model_validator(mode="after")
    def _positive_scale(self) -> Self:
        if self.scale != "least_squares" and self.scale <= 0:
            raise ValueError(f"scale = {self.scale} must be above 0 or 'least_squares'")
        return self

    @model_validator(mode="after")
    def _nothing_beside_when_in_place(self) -> Self:
        if self.place != "in_place":
            return self
        for name, only in (("scale", 1.0), ("sharing", "personal"), ("dropout", 0.0)):
            if (value := getattr(self, name)) != only:
                raise ValueError(f"{name} = {value!r} must be {only!r} with place = 'in_place'")
        return self

    @model_validator(mode="after")
    def _personal_settings_need_a_personal_graft(self) -> Self:
        for name, only in (("scale", 1.0), ("dropout", 0.0)):
            if self.sharing == "shared" and (value := getattr(self, name)) != only:
                raise ValueError(f"{name} = {value!r} is for a personal graft; sharing = 'shared' has none")
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


class PartitionConfig(Section):
    """One pooled data set, divided over the clients; every row goes to exactly one of them."""

    source: str
    """File (.jsonl, .json, .csv, .parquet) or hub:org/name[:split] with all rows."""
    test: str | None = None
    """Test file; without it, data.test_fraction of each client's passages is held out."""
    by: Literal["pathological", "dirichlet", "natural", "iid"]
    """A few categories per client, a Dirichlet draw per category, a column of client ids, or at random."""
    clients: int | None = Field(None, ge=1)
    """Clients; with natural, the column's values are the clients."""
    column: str = Field("category", min_length=1)
    """What rows are told apart by: the field category, or any column of the source."""
    categories_per_client: int = Field(1, ge=1)
    """Categories of each client (pathological)."""
    alpha: float = Field(0.5, gt=0)
    """Concentration (dirichlet): the smaller, the more the clients differ."""
    min_rows: int = Field(8, ge=1)
    """Fewest rows a client may get, before test rows are held out."""

    @model_validator(mode="after")
    def _applying(self) -> Self:
        if idle := sorted(self._idle() & self.model_fields_set):
            raise ValueError(f"{', '.join(idle)} does not apply to by = {self.by!r}; leave it out")
        if self.clients is None and self.by != "natural":
            raise ValueError(f"by = {self.by!r} needs clients, the number of them")
        return self

    @model_serializer(mode="wrap")
    def _without_idle(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved run must be readable again, and settings that do not apply are refused when given."""
        return {name: value for name, value in write(self).items() if name not in self._idle()}

    def _idle(self) -> set[str]:
        """Settings that mean nothing for this ``by``."""
        used = {
            "pathological": {"clients", "column", "categories_per_client"},
            "dirichlet": {"clients", "column", "alpha"},
            "natural": {"column"},
            "iid": {"clients"},
        }
        return set().union(*used.values()) - used[self.by]


class DataConfig(Section):
    """Who has which rows: exactly one of silos, folder, clients, partition."""

    silos: SilosConfig | None = None
    """The shipped silos."""
    folder: str | None = None
    """A folder with one sub-folder per client that holds train.jsonl and test.jsonl."""
    clients: dict[str, ClientFiles] = {}
    """Client name -> its files."""
    partition: PartitionConfig | None = None
    """One pooled data set, divided over clients."""
    columns: dict[str, str] = {}
    """Field (instruction, context, response, category) -> column, where it is named otherwise."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of passages held out where a client has no test file."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of each client's train passages that is neither trained on nor tested: settings are chosen on it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = ("silos", "folder", "clients", "partition")
        given = [n for n in sources if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)} (now: {', '.join(given) or 'none'})")
        if unknown := set(self.columns) - {"instruction", "context", "response", "category"}:
            raise ValueError(f"columns maps {sorted(unknown)}; fields are instruction, context, response, category")
        return self


class MethodConfig(Section):
    """The federated method."""

    name: str = "flex"
    """See `flexperts methods`."""
    options: dict[str, Any] = {}
    """The method's own settings, such as FedProx's mu; see docs/methods.md."""
    reference: str | None = None
    """A second method, run at the same budget and seed and reported beside the first; its options are defaults."""


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
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local step; sgd is without momentum."""
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
    """Rounds."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that is drawn to train in each round; all are evaluated."""


class EvaluationConfig(Section):
    """Scoring on rows that are not trained on."""

    split: Literal["test", "validation"] = "test"
    """Rows that are scored: validation to choose settings by, test to report."""
    rows: int | None = Field(None, ge=1)
    """Rows per client that are scored; without it, all."""
    every: int | None = Field(None, ge=1)
    """Evaluate after every so many rounds; the last round is always evaluated."""
    answers: Literal["always", "last"] = "always"
    """Generate answers in every evaluated round, or in the last one only; NLL is always taken."""
    others_rows: int = Field(0, ge=0)
    """Rows of every other client that a client's model is scored on in the end (clients in one process only)."""
    routing_rows: int = Field(0, ge=0)
    """Rows per client whose routing is described at every evaluation; 0 = none."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest generated answer."""
    batch_size: int = Field(20, ge=1)
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
    """Methods and variants, in the order of the table; empty = the recipe's own method and its reference."""
    variants: dict[str, tuple[str, ...]] = {}
    """Name -> settings (KEY=VALUE) on top of the recipe; under a method's name, settings which that method needs."""
    seeds: int = Field(3, ge=1)
    """Seeds 0, 1, ... that every entry runs with."""
    reference: str | None = None
    """Entry that the others are compared with; without it, the first one."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples."""


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
    knowledge: KnowledgeConfig = KnowledgeConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _validation_exists(self) -> Self:
        if self.evaluation.split == "validation" and not self.data.validation_fraction:
            raise ValueError("evaluation.split = 'validation' needs data.validation_fraction above 0")
        return self

    def to_toml(self) -> str:
        """Return the complete run as TOML, defaults written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json", exclude={"compare"}))

    def with_method(self, name: str) -> RunConfig:
        """Return the same run with another method and no reference."""
        return self.model_copy(update={"method": MethodConfig(name=name)})
