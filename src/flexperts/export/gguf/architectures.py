"""The architecture of llama.cpp that computes what a model of transformers computes, or a refusal.

llama.cpp's code fixes what a config says in transformers, such as whether the weights of the chosen experts sum
to 1. A file with the right tensors and another rule would load and answer wrongly, so every such rule is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from flexperts.errors import ConfigError

Named = Iterator[tuple[str, Tensor]]

_ENDS = (".weight", ".bias")
_REMEDY = "use --form transformers"
_SHARED_GATE = 0.5
"""sigmoid(0): the factor of a shared expert whose gate has only zeros as weights."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model.

    Args:
        kind: llama.cpp's architecture.
        lengths: Widths of the layers' parts: arguments of the writer's methods ``add_*`` by the methods' names.
        weights: Returns the model's tensors by transformers' names, as the architecture needs them.
        layers: Number of layers.
    """

    kind: gguf.MODEL_ARCH
    lengths: Mapping[str, Any]
    weights: Callable[[], Named]
    layers: int

    def tensors(self) -> Named:
        """Yield the tensors by llama.cpp's names."""
        names = gguf.get_tensor_name_map(self.kind, self.layers)
        for name, tensor in self.weights():
            theirs = names.get_name(name, try_suffixes=_ENDS)
            if theirs is None:
                rule = f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.kind]} has no place for it"
                raise ConfigError(f"--form gguf of the weight {name}", rule, _REMEDY)
            yield theirs, tensor


def architecture_of(model: Any) -> Architecture:
    """Return how llama.cpp computes a model.

    Args:
        model: A causal language model of transformers.

    Raises:
        ConfigError: No architecture of llama.cpp that is known here computes the same.
    """
    config = model.config
    makers = {"qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe}
    if config.model_type not in makers:
        rule = f"it is written for the types {', '.join(makers)}"
        remedy = f"{_REMEDY}, and convert that folder with llama.cpp's convert_hf_to_gguf.py if it knows the type"
        raise ConfigError(f"--form gguf of a base of the type {config.model_type}", rule, remedy)
    rope = config.rope_parameters
    for name, value, needed in (
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("use_sliding_window", getattr(config, "use_sliding_window", False), False),
        ("clip_qkv", getattr(config, "clip_qkv", None), None),
    ):
        _require(config, name, value, needed)
    return makers[config.model_type](model, _common(config))


def _common(config: Any) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
        "rope_dimension_count": head,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "feed_forward_length": config.intermediate_size,
    }


def _qwen2_moe(model: Any, common: dict[str, Any]) -> Architecture:
    config = model.config
    gates = [tensor for name, tensor in model.named_parameters() if name.endswith("shared_expert_gate.weight")]
    if gates and not any(gate.any() for gate in gates):
        return _without_shared_gate(model, common)
    # llama.cpp divides by the gate's input, so one that is always 0 gives no number.
    _require(config, "shared_expert_gate", "0 in some layers" if not all(map(_any, gates)) else "", "")
    _require(config, "norm_topk_prob", config.norm_topk_prob, False)
    _require(config, "mlp_only_layers", _dense_layers(config), [])
    lengths = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }
    return Architecture(
        gguf.MODEL_ARCH.QWEN2MOE,
        common | lengths,
        lambda: _weights(model, output=True),
        config.num_hidden_layers,
    )


def _qwen3_moe(model: Any, common: dict[str, Any]) -> Architecture:
    config = model.config
    _require(config, "norm_topk_prob", config.norm_topk_prob, True)
    _require(config, "attention_bias", config.attention_bias, False)
    _require(config, "mlp_only_layers", _dense_layers(config), [])
    lengths = {"expert_feed_forward_length": config.moe_intermediate_size}
    return Architecture(
        gguf.MODEL_ARCH.QWEN3MOE, common | lengths, lambda: _weights(model), config.num_hidden_layers
    )


def _olmoe(model: Any, common: dict[str, Any]) -> Architecture:
    config = model.config
    _require(config, "norm_topk_prob", config.norm_topk_prob, False)
    _require(config, "attention_bias", config.attention_bias, False)
    _require(config, "num_key_value_heads", config.num_key_value_heads, config.num_attention_heads)
    return Architecture(
        gguf.MODEL_ARCH.OLMOE, common, lambda: _weights(model, output=True), config.num_hidden_layers
    )


def _without_shared_gate(model: Any, common: dict[str, Any]) -> Architecture:
    """Return a qwen2_moe whose shared expert has a constant factor (smol-moe) as llama.cpp's granitemoe.

    There the weights of the chosen experts sum to 1, the shared expert has no gate, and every layer has experts. A
    dense layer becomes the shared expert of a layer whose routed experts are 0. All shared experts get the width of
    the widest; what is added is 0.
    """
    config = model.config
    _require(config, "norm_topk_prob", config.norm_topk_prob, True)
    dense = _dense_layers(config)
    width = max(config.shared_expert_intermediate_size, config.intermediate_size if dense else 0)
    lengths = {
        "feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": width,
        "logit_scale": 1.0,
    }

    def weights() -> Named:
        for name, tensor in _weights(model):
            if name.endswith("shared_expert_gate.weight"):
                continue
            if ".mlp.shared_expert.down_proj" in name:
                tensor = tensor * _SHARED_GATE
            if ".q_proj." in name or ".k_proj." in name:
                tensor = _neighbours(tensor, common["key_length"])
            is_dense = name.count(".mlp.") and int(name.split(".")[2]) in dense
            name = name.replace(".mlp.", ".mlp.shared_expert.") if is_dense else name
            yield name, _padded(tensor, width, name) if ".mlp.shared_expert." in name else tensor
        for layer in dense:
            yield from _silent_experts(config, layer)

    return Architecture(gguf.MODEL_ARCH.GRANITE_MOE, common | lengths, weights, config.num_hidden_layers)


def _weights(model: Any, *, output: bool = False) -> Named:
    """Yield a model's weights by the names of its checkpoints, with one tensor ``[N, ...]`` for a layer's experts.

    Args:
        model: The model.
        output: Whether the output layer is needed where its weights are those of the embedding.
    """
    tied = model.config.tie_word_embeddings and not output
    for name, tensor in model.state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for side, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                yield f"{name.removesuffix('gate_up_proj')}{side}_proj.weight", half
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", tensor
        elif name.endswith("shared_expert_gate.weight"):
            yield name, tensor.squeeze(0)
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor


def _neighbours(weight: Tensor, head: int) -> Tensor:
    """Return a projection whose rows that rotate together, half a head apart in transformers, are neighbours."""
    halves = weight.reshape(-1, 2, head // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _padded(weight: Tensor, width: int, name: str) -> Tensor:
    """Return a projection of a shared expert with zeros up to a width."""
    missing = width - weight.shape[1 if "down_proj" in name else 0]
    return F.pad(weight, (0, missing) if "down_proj" in name else (0, 0, 0, missing))


def _silent_experts(config: Any, layer: int) -> Named:
    """Yield a router and experts whose output is 0."""
    count, inside, outside = config.num_experts, config.moe_intermediate_size, config.hidden_size
    start = f"model.layers.{layer}.mlp"
    yield f"{start}.gate.weight", torch.zeros(count, outside)
    for name, shape in (("gate", (inside, outside)), ("up", (inside, outside)), ("down", (outside, inside))):
        yield f"{start}.experts.{name}_proj.weight", torch.zeros(count, *shape)


def _dense_layers(config: Any) -> list[int]:
    """Return the layers without experts."""
    step = config.decoder_sparse_step
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if layer in config.mlp_only_layers or (layer + 1) % step]


def _any(tensor: Tensor) -> bool:
    return bool(tensor.any())


def _require(config: Any, name: str, value: Any, needed: Any) -> None:
    if value != needed:
        what = f"--form gguf of a {config.model_type} with {name} = {value}"
        raise ConfigError(what, "no architecture of llama.cpp computes it", _REMEDY)
