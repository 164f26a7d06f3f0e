"""Loading a base with its routed experts in 8 or 4 bits, and telling in bytes what that came to.

transformers' own quantizers replace ``nn.Linear`` layers and leave fused experts, most of a MoE's weights, as they
are. This one quantizes what ``find_experts`` finds, tensor by tensor while it is loaded, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexperts.errors import ModelError
from flexperts.moe.attention import attention_modules
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import BLOCK, QuantizedTensor, Scheme, quantized_bytes
from flexperts.parameters.fingerprint import stored_bytes

_METHOD = "flexperts"


@register_quantization_config(_METHOD)
class ExpertsQuantization(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers is asked for.

    Args:
        scheme: int8 or nf4.
    """

    def __init__(self, scheme: Scheme, **_: Any) -> None:
        self.quant_method, self.scheme = _METHOD, scheme


@register_quantizer(_METHOD)
class ExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes the routed experts of a model while transformers loads it."""

    requires_calibration = False
    is_trainable = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.names = quantizable(model)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Tell whether a parameter is one of the experts'."""
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes one parameter."""
        return _Quantize(self.quantization_config.scheme)

    def is_serializable(self) -> bool:
        """Quantized bases are made at every start, not saved."""
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Quantizes what has been loaded."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        """Return the loaded parameter, quantized, by its name in the model."""
        (loaded,) = input_dict.values()
        weight = loaded[0] if isinstance(loaded, list) else loaded
        return {full_layer_name: QuantizedTensor.quantize(weight, self.scheme)}


def quantizable(model: nn.Module) -> set[str]:
    """Return the names of the expert weights that can be quantized: fused, in whole blocks."""
    fits = {id(p) for e in find_experts(model) for p in e.stored if p.dim() == 3 and not p[0].numel() % BLOCK}
    return {name for name, parameter in model.named_parameters() if id(parameter) in fits}


def check_quantizer(config: Any, base: str) -> None:
    """Refuse to quantize where bitsandbytes is missing, or what is quantized already.

    Args:
        config: The base's configuration.
        base: What the user calls it.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization", "it needs bitsandbytes", "install flexperts[quantization], or set it to none"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.base = {base!r}", "its checkpoint is quantized already", "set model.quantization = 'none'"
        )


def check_quantized(model: nn.Module, base: str) -> None:
    """Refuse a base whose experts have stayed in full precision though they were to be quantized."""
    experts = [name for name, part in _parts(model) if part == EXPERTS]
    weights = [model.get_parameter(name) for name in experts if "bias" not in name.rpartition(".")[2]]
    if full := sum(stored_bytes(w) for w in weights if not isinstance(w, QuantizedTensor)):
        raise ModelError(
            f"model.quantization on {base!r}",
            f"{full:,} of {sum(map(stored_bytes, weights)):,} bytes of expert weights stay in full precision: "
            f"they are not fused, or no multiple of {BLOCK} values",
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
        before: Bytes in the type that it stands for.
        after: Bytes as it is stored.
    """

    part: str
    types: tuple[str, ...]
    before: int
    after: int


def storage(model: nn.Module) -> list[Storage]:
    """Return how a model is stored, part by part in the order of ``PARTS``; what it does not have is left out."""
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
    """Return in a line what was quantized and what was not, in bytes."""
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
    """Return the bytes of a model on the meta device once its experts are quantized; ``none`` leaves them."""
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
    except ModelError:  # dense: methods that need no experts run on it
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
