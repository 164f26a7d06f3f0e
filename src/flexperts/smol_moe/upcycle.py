"""Splitting a dense Llama into a standard `Qwen2MoeForCausalLM` by a partition of its FFN neurons.

If all routed experts are active, the split model computes the dense function; with fewer, it leaves out the neurons
of the experts that are not chosen. No weight is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexperts.errors import ModelError
from flexperts.smol_moe.dense import special_ids
from flexperts.smol_moe.neuron_partition import NeuronPartition

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
)
SHARED_GATE = 0.5
"""sigmoid(0): the factor of Qwen2Moe's shared expert while the weight of its gate is zero."""


def moe_config(dense: LlamaConfig, partition: NeuronPartition) -> Qwen2MoeConfig:
    """Return the configuration of the split model.

    Args:
        dense: Config of the dense Llama.
        partition: Which neurons form which expert.
    """
    from transformers import Qwen2MoeConfig

    _check_fit(dense, partition)
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in KEPT},
        rope_parameters=dict(dense.rope_parameters),
        tie_word_embeddings=dense.tie_word_embeddings,
        qkv_bias=False,
        norm_topk_prob=True,
        num_experts=partition.experts,
        num_experts_per_tok=partition.top_k,
        moe_intermediate_size=partition.expert_size,
        shared_expert_intermediate_size=partition.shared_size,
        mlp_only_layers=[i for i in range(dense.num_hidden_layers) if i not in partition.layers],
        **special_ids(),
    )


def _check_fit(dense: LlamaConfig, partition: NeuronPartition) -> None:
    neurons = partition.shared_size + partition.experts * partition.expert_size
    found = (dense.intermediate_size, dense.hidden_size)
    wanted = (neurons, int(partition.routers.shape[2]))
    if found != wanted or max(partition.layers) >= dense.num_hidden_layers:
        raise ModelError(
            f"dense model with FFN x hidden {found} and {dense.num_hidden_layers} layers",
            f"must have {wanted} and a layer {max(partition.layers)} for this partition",
            "give the weights of SmolLM2-135M-Instruct, or compute a partition for this model",
        )


def moe_state(state: Mapping[str, torch.Tensor], partition: NeuronPartition) -> dict[str, torch.Tensor]:
    """Return the split model's state dict, made from rows and columns of the dense one.

    Args:
        state: The dense model's parameters under transformers' Llama names.
        partition: Which neurons form which expert.

    Returns:
        Parameters under transformers' Qwen2Moe names; those outside the split layers are the same tensors.
    """
    split = tuple(f"model.layers.{layer}.mlp." for layer in partition.layers)
    out = {name: tensor for name, tensor in state.items() if not name.startswith(split)}
    for row, prefix in enumerate(split):
        out.update(_split_ffn(state, prefix, partition, row))
    return out


def _split_ffn(
    state: Mapping[str, torch.Tensor], prefix: str, partition: NeuronPartition, row: int
) -> dict[str, torch.Tensor]:
    import torch

    gate, up, down = (state[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    shared, routed = partition.shared[row].long(), partition.routed[row].long()
    experts = torch.cat([gate[routed], up[routed]], dim=1)  # [E, 2W, hidden]
    downs = down[:, routed].permute(1, 0, 2) * partition.top_k  # [E, hidden, W]
    return {
        f"{prefix}gate.weight": partition.routers[row].to(gate.dtype) * partition.router_scale,
        f"{prefix}experts.gate_up_proj": experts,
        f"{prefix}experts.down_proj": downs.contiguous(),
        f"{prefix}shared_expert.gate_proj.weight": gate[shared],
        f"{prefix}shared_expert.up_proj.weight": up[shared],
        f"{prefix}shared_expert.down_proj.weight": down[:, shared] / SHARED_GATE,
        f"{prefix}shared_expert_gate.weight": gate.new_zeros(1, gate.shape[1]),
    }


def upcycle(
    config: LlamaConfig, state: Mapping[str, torch.Tensor], partition: NeuronPartition
) -> Qwen2MoeForCausalLM:
    """Return a new split model in float32 and eval mode.

    Args:
        config: Config of the dense Llama.
        state: The dense model's parameters under transformers' Llama names.
        partition: The split.
    """
    import torch
    from transformers import GenerationConfig, Qwen2MoeForCausalLM

    with torch.random.fork_rng(devices=[]):  # the caller's random state must not depend on a build
        model = Qwen2MoeForCausalLM(moe_config(config, partition))
    missing, unexpected = model.load_state_dict(moe_state(state, partition), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ModelError(
            f"dense state with {sorted({*missing, *unexpected} - tied)[:3]}",
            "must fit the split model's parameters",
            "give the weights of SmolLM2-135M-Instruct",
        )
    model.tie_weights()
    model.generation_config = GenerationConfig(**special_ids())
    return model.eval()
