"""Save a split base as an ordinary model folder: weights, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexperts.smol_moe.upcycle import upcycle

if TYPE_CHECKING:
    from flexperts.smol_moe.dense import DenseModel
    from flexperts.smol_moe.neuron_split import Partition

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
language: [en]
tags: [mixture-of-experts, qwen2_moe, flexperts]
---

# smol-moe

A small mixture-of-experts model with pretrained weights, made by flexperts. It is
[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) with the feed-forward
networks of layers {layers} split: {shared} neurons stay active for every token, the other
{routed} form {experts} experts of {size}, of which a router picks {top_k}. No weight was trained; what the
experts that are not picked would have added is dropped, so the model is slightly worse than the
dense one until it is fine-tuned. The class is transformers' own `Qwen2MoeForCausalLM`.

- Dense weights: {origin}, sha256 `{dense_sha256}`.
- Partition: `{command}`, calibrated on {groups} texts written for this purpose ({tokens} tokens).
- Chat format: ChatML without a default system prompt; eos `<|im_end|>` (2), pad `<|endoftext|>` (0).
- Licence: Apache-2.0, that of SmolLM2 (Hugging Face TB) and of flexperts. The weights were rearranged
  and rescaled as described above; this notice states the change as the licence asks.
- Intended for research on federated fine-tuning. It is small, English only, and often wrong.
"""


def save_base(dense: DenseModel, partition: Partition, folder: Path) -> None:
    """Split a dense model and save it in bfloat16 with its tokenizer and a model card.

    Args:
        dense: The dense model.
        partition: Its split.
        folder: An existing, empty folder.
    """
    import torch

    model = upcycle(dense.config, dense.state, partition).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="10GB")
    dense.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    (folder / "README.md").write_text(card(dense, partition), encoding="utf-8")


def card(dense: DenseModel, partition: Partition) -> str:
    """The model card of a split model, in Markdown."""
    about: dict[str, Any] = {"command": "unknown", "groups": "?", "tokens": "?", **partition.metadata}
    return CARD.format(
        layers=", ".join(map(str, partition.layers)),
        shared=partition.shared_size,
        routed=partition.experts * partition.expert_size,
        experts=partition.experts,
        size=partition.expert_size,
        top_k=partition.top_k,
        origin=dense.source.origin,
        dense_sha256=dense.source.sha256,
        **{key: about[key] for key in ("command", "groups", "tokens")},
    )
