"""Settings of the base, of LoRA and of the grafts."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from flexperts.config.data import Template
from flexperts.config.section import FreeSettings, Section
from flexperts.errors import shown

_PLACE = re.compile(r"cpu|disk|cuda:\d+")


class ModelConfig(Section):
    """The pretrained MoE that every client starts from."""

    base: str = "smol-moe"
    """A shipped base's name, a local transformers folder, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of the frozen weights."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the matrix products (autocast); trained weights are always fp32."""
    template: Template = "auto"
    """Prompt template: auto = the tokenizer's chat template where it has one, else alpaca."""
    chat_template_kwargs: FreeSettings = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking = false}."""
    template_date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Date (YYYY-MM-DD) given to chat templates that ask for today's; without it, the day of the run's start."""
    device: str = "auto"
    """Deprecated, until 0.3: a device belongs to a machine, not to a run. Use ``--device`` or FLEXPERTS_DEVICE."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the frozen routed experts are stored: in dtype, or in 8 or 4 bits; all else stays in dtype. It excludes
    device_map."""
    dequantize: bool = False
    """Load a checkpoint that stores its weights as codes (FP8, MXFP4, ...) in dtype. Without it such a checkpoint
    is refused: LoRA, grafts and the selection compute with the weights' values."""
    device_map: Literal["auto"] | dict[str, str] | None = None
    """Where what does not fit the device is: module name -> cpu or disk, for all routed experts in the module
    between uses; or cuda:N, for all layers in the module; or auto: experts on the device up to max_memory, then in
    the CPU's memory, then on disk."""
    max_memory: dict[Literal["device", "cpu"], str] = Field(default_factory=dict)
    """The most that device_map = "auto" fills, such as "8GiB"; without it, 70 % of what is free."""
    offload_folder: str | None = None
    """Folder for experts on disk, where the base's own files store them in another layout."""
    preflight: bool = True
    """Let `flexperts run` refuse what does not fit the machine's memory, before it loads a base of 1 GB or more."""
    trust_remote_code: bool = False
    """Run code that comes with the base, if --trust-remote-code on the command line asks for it too; only for bases
    that you trust."""

    @field_validator("device_map", mode="before")
    @classmethod
    def _one_computing_device(cls, given: object) -> object:
        places = given.values() if isinstance(given, dict) else () if given in ("auto", None) else (given,)
        if odd := [place for place in places if not _PLACE.fullmatch(str(place))]:
            raise ValueError(
                f"{shown(odd[0])} is not a place for experts: write auto, or module names with cpu, disk or "
                "cuda:N; for several cards see docs/large-models.md"
            )
        if len({str(place).partition(":")[0] == "cuda" for place in places}) > 1:
            raise ValueError("layers on other cards and experts on cpu or disk exclude each other")
        return given

    @model_validator(mode="after")
    def _quantized_in_one_place(self) -> Self:
        if self.quantization != "none" and self.device_map is not None:
            raise ValueError(f"quantization = {self.quantization!r} and device_map exclude each other")
        return self

    @model_validator(mode="after")
    def _limits_are_for_auto(self) -> Self:
        if self.max_memory and self.device_map != "auto":
            raise ValueError("max_memory is for device_map = 'auto'")
        return self


class LoraConfig(Section):
    """LoRA on the attention projections: the shared part."""

    rank: int = Field(8, ge=1)
    """Rank r."""
    alpha: float = Field(16.0, gt=0)
    """Scaling numerator: LoRA's output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of every LoRA in training, also of LoRA and low-rank experts that a method adds; grafts
    have none."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Last names of the attention Linear layers to adapt; empty = every attention projection that is found."""


class GraftConfig(Section):
    """The personal experts."""

    experts: int = Field(1, ge=1)
    """Personal experts per MoE layer (k)."""
    rank: int | Literal["full"] = "full"
    """LoRA rank of the personal experts, at least 1, or "full" for trainable copies."""
    alpha: float = Field(16.0, gt=0)
    """LoRA scaling numerator of the personal experts."""
    start: Literal["copy", "silent"] = "copy"
    """copy = the pretrained expert as it is; silent = with its down projection at zero, so that the untrained graft
    changes nothing (needs rank "full" and place "beside")."""
    output: Literal["auto", "expert", "difference"] = "auto"
    """What a gate opens to: expert = the personal expert's output; difference = that output minus the output of the
    frozen expert it started from, so that the untrained graft changes nothing (needs start "copy", place "beside"
    and a number as scale); auto = difference for the method flex where these allow it, else expert."""
    gate_bias: float = 0.0
    """The gate's bias at the start; 0 = half open, if its weight starts at zero."""
    gate_start: Literal["constant", "router"] = "constant"
    """The gate's weight at the start: constant = zero, so the gate is equally open for all tokens; router = the
    router's row of the chosen expert (needs place "beside")."""
    gate_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the gates; without it, that of the experts they belong to (needs place "beside")."""
    calibration_rows: int = Field(64, ge=1)
    """Train rows whose tokens the selection reads."""
    calibration_tokens: int = Field(8192, ge=1)
    """Token budget of the selection, per layer."""
    selection: Literal[
        "reconstruction", "scaled", "frequency", "router_weight", "random", "greedy", "exhaustive"
    ] = "reconstruction"
    """Rule that picks the experts to graft; FLEx's own is reconstruction. See docs/flex.md."""
    layers: tuple[int, ...] = ()
    """MoE layers that get a graft, counted from 0, negative from the end; empty = all."""
    scale: float | Literal["least_squares"] = 1.0
    """Factor on a personal expert's output, above 0; least_squares = the coefficients that best rebuild the routed
    output from the chosen experts."""
    place: Literal["beside", "in_place"] = "beside"
    """beside = one expert more, with a gate; in_place = the chosen expert itself is adapted, no gate (needs the
    default output, gate_bias, gate_start, gate_lr, scale, sharing and dropout)."""
    sharing: Literal["personal", "shared", "both"] = "personal"
    """personal = the client owns the grafted expert; shared = it is averaged over the clients (needs the default
    selection, scale and dropout); both = one of each."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training batches without the graft, so that the shared part learns to work without it."""

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
    def _silent_start_is_whole(self) -> Self:
        if self.start == "silent" and (self.rank != "full" or self.place != "beside"):
            raise ValueError("start = 'silent' needs rank = 'full' and place = 'beside'")
        return self

    @model_validator(mode="after")
    def _difference_to_a_copy(self) -> Self:
        if self.output != "difference":
            return self
        if self.start == "silent":
            raise ValueError("output = 'difference' is silent at its start: it needs start = 'copy'")
        if self.scale == "least_squares":
            raise ValueError("scale = 'least_squares' is for output = 'expert': at the start all differences are 0")
        return self

    @model_validator(mode="after")
    def _nothing_beside_when_in_place(self) -> Self:
        if self.place != "in_place":
            return self
        if self.output == "difference":
            raise ValueError("output = 'difference' must be 'expert' with place = 'in_place'")
        if self.gate_lr is not None:
            raise ValueError(f"gate_lr = {self.gate_lr} is for a gate; place = 'in_place' has none")
        for name, only in (
            ("gate_bias", 0.0),
            ("gate_start", "constant"),
            ("scale", 1.0),
            ("sharing", "personal"),
            ("dropout", 0.0),
        ):
            if (value := getattr(self, name)) != only:
                raise ValueError(f"{name} = {value!r} must be {only!r} with place = 'in_place'")
        return self

    def opens_to(self, preferred: Literal["expert", "difference"]) -> Literal["expert", "difference"]:
        """Return what a gate opens to: the setting, or what a method prefers where the other settings allow it."""
        if self.output != "auto":
            return self.output
        can = self.start == "copy" and self.place == "beside" and self.scale != "least_squares"
        return preferred if can else "expert"

    @model_validator(mode="after")
    def _personal_settings_need_a_personal_graft(self) -> Self:
        for name, only in (("selection", "reconstruction"), ("scale", 1.0), ("dropout", 0.0)):
            if self.sharing == "shared" and (value := getattr(self, name)) != only:
                raise ValueError(f"{name} = {value!r} is for a personal graft; sharing = 'shared' has none")
        return self
