"""Tiny random models and a byte tokenizer: for tests of this package and of code that builds on it.

Nothing in the package imports this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _EXPERTS
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": _LOCAL_EXPERTS | {"head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
    "granitemoe": _LOCAL_EXPERTS,
    "mixtral": _LOCAL_EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "phimoe": _LOCAL_EXPERTS,
    "qwen2_moe": _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS | {"num_experts": 4, "head_dim": 8},
}
"""Model type -> what its tiny config needs beside the common sizes."""

METHOD_SETTINGS: dict[str, tuple[str, ...]] = {"scaffold": ("training.optimizer=sgd", "training.lr=0.5")}
"""Method -> the overrides without which it refuses to run."""


def tiny_model(
    family: str = "qwen2_moe", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """Return a random two-layer MoE causal language model of a family, in eval mode, weights frozen.

    Args:
        family: A key of ``FAMILIES``.
        seed: Seed of the weights.
        dtype: Storage type.
        settings: Config values on top of the family's.
    """
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # Some families start routers and biases at zero; then routing would depend on nothing.
        for parameter in model.parameters():
            if parameter.std() == 0 or parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes and three special ones; it needs no files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = _CHAT if chat else None
    return tokenizer


def save_tiny_base(
    folder: Path, family: str = "qwen2_moe", *, seed: int = 0, chat: bool = True, **settings: Any
) -> Path:
    """Save a tiny model with its tokenizer as an ordinary transformers folder, and return it."""
    tiny_model(family, seed=seed, **settings).save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder
