"""Loading of a base with its routed experts in 8 or 4 bits, and the resulting sizes in bytes.

transformers' quantizers replace ``nn.Linear`` layers and do not change fused experts, which are most of a MoE's
weights. This quantizer quantizes only what ``find_experts`` finds, tensor by tensor during loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexperts.errors import ModelError
from flexperts.moe.attention import attention_modules
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import BLOCK, QuantizedTensor, Scheme, quantized_bytes
from flexperts.parameters.fingerprint import stored_bytes

_METHOD = "flexperts"


@register_quantization_config(_METHOD)
class ExpertsQuantization(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization setting for transformers.

    Args:
        scheme: int8 or nf4.
    """

    def __init__(self, scheme: Scheme, **_: Any) -> None:
        self.quant_method, self.scheme = _METHOD, scheme


@register_quantizer(_METHOD)
class ExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizer of a model's routed experts while transformers loads it."""

    requires_calibration = False
    is_trainable = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.names = quantizable(model)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Return whether a parameter belongs to the experts."""
        return param_name in self.names

    @property
    def quantized_element_size(self) -> float:
        """Bytes per value, scales included; transformers reserves the model's memory on a card by it."""
        return quantized_bytes((BLOCK,), self.quantization_config.scheme) / BLOCK

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one parameter."""
        return _Quantize(self.quantization_config.scheme)

    def is_serializable(self) -> bool:
        """Return False: quantized bases are not saved but made at every start."""
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]
    """The operation that quantizes a loaded parameter."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        """Return the quantized parameter under its name in the model."""
        (loaded,) = input_dict.values()
        weight = loaded[0] if isinstance(loaded, list) else loaded
        return {full_layer_name: QuantizedTensor.quantize(weight, self.scheme)}


def quantizable(model: nn.Module) -> set[str]:
    """Return the names of the expert weights that can be quantized: fused tensors in whole blocks."""
    fits = {id(p) for e in find_experts(model) for p in e.stored if p.dim() == 3 and not p[0].numel() % BLOCK}
    return {name for name, parameter in model.named_parameters() if id(parameter) in fits}


def check_quantizer(config: Any, base: str) -> None:
    """Refuse to quantize without bitsandbytes, or a base that is already quantized.

    Args:
        config: The base's configuration.
        base: The base's name in the recipe.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization",
            "it needs bitsandbytes",
            "run pip install 'flexperts[quantization]', or set it to none",
        )
    if checkpoint_method(config) is not None:
        raise ModelError(
            f"model.base = {base!r}", "its checkpoint is already quantized", "set model.quantization = 'none'"
        )


def checkpoint_method(config: Any) -> str | None:
    """Return how a checkpoint's weights are quantized, such as ``mxfp4``; None if they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method"))


def dequantizing(described: Any, base: str, *, asked: bool) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that make a checkpoint's codes values again, if it stores codes.

    Args:
        described: The base's configuration; it is changed.
        base: The base's name in the recipe.
        asked: Whether the recipe has ``model.dequantize``.

    Raises:
        ModelError: The recipe does not ask for it, or transformers cannot do it.
    """
    if (method := checkpoint_method(described)) is None:
        return {}
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    can = kind is not None and "dequantize" in signature(kind).parameters
    if can and asked:
        described.quantization_config["dequantize"] = True
        return {"config": described}
    raise ModelError(
        f"model.base = {base!r}",
        f"its checkpoint stores weights as codes ({method}), and LoRA, grafts and the selection need their values",
        "set model.dequantize = true, which stores them in model.dtype (see the size by `flexperts plan`)"
        if can
        else "use a checkpoint of this model in full precision",
    )


def check_quantized(model: nn.Module, base: str) -> None:
    """Refuse a base with experts that stayed in full precision although the recipe quantizes them."""
    experts = [name for name, part in _parts(model) if part == EXPERTS]
    weights = [model.get_parameter(name) for name in experts if "bias" not in name.rpartition(".")[2]]
    if full := sum(stored_bytes(w) for w in weights if not isinstance(w, QuantizedTensor)):
        raise ModelError(
            f"model.quantization on {base!r}",
            f"{full:,} of {sum(map(stored_bytes, weights)):,} bytes of expert weights stay in full precision: "
            f"they are not fused, or their size is not a multiple of {BLOCK} values",
            "set model.quantization = 'none'",
        )


EXPERTS = "routed experts"
PARTS = (EXPERTS, "attention", "embeddings", "other")


@dataclass(frozen=True)
class Storage:
    """How one part of a model is stored.

    Args:
        part: One of ``PARTS``.
        types: The storage types, such as ``nf4``.
        before: Bytes in the dtype before quantization.
        after: Bytes as stored.
    """

    part: str
    types: tuple[str, ...]
    before: int
    after: int


def storage(model: nn.Module) -> list[Storage]:
    """Return how a model is stored, by part in the order of ``PARTS``; parts that it does not have are left out."""
    held: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, part in _parts(model):
        held[part].append(model.get_parameter(name))
    return [
        Storage(
            part,
            tuple(sorted({_type(p) for p in own})),
            sum(p.numel() * p.element_size() for p in own),
            sum(stored_bytes(p) for p in own),
        )
        for part, own in held.items()
        if own
    ]


def storage_line(model: nn.Module) -> str:
    """Return a line with the storage type and megabytes of each part."""
    return "stored: " + "; ".join(
        f"{row.part} {', '.join(row.types)} {row.after / 1e6:,.1f} MB"
        + (f" (of {row.before / 1e6:,.1f})" if row.after != row.before else "")
        for row in storage(model)
    )


def _type(parameter: Tensor) -> str:
    """Return the name of a parameter's storage type."""
    own = parameter.scheme if isinstance(parameter, QuantizedTensor) else str(parameter.dtype)
    return own.removeprefix("torch.")


def planned_bytes(model: nn.Module, scheme: Literal["none"] | Scheme) -> int:
    """Return the bytes that a model on the meta device will take with this quantization of its experts."""
    if scheme == "none":
        return sum(map(stored_bytes, model.parameters()))
    names = quantizable(model)
    return sum(
        quantized_bytes(p.shape, scheme) if name in names else stored_bytes(p)
        for name, p in model.named_parameters()
    )


def _parts(model: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, part) of every parameter."""
    try:
        experts = {id(p) for e in find_experts(model) for p in e.stored}
    except ModelError:  # a dense model, which methods without experts can use
        experts = set()
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    embedded = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    attention = tuple(f"{name}." for name in attention_modules(model))
    for name, parameter in model.named_parameters():
        if id(parameter) in experts:
            yield name, EXPERTS
        elif id(parameter) in embedded:
            yield name, "embeddings"
        else:
            yield name, "attention" if name.startswith(attention) else "other"
