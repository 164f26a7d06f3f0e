"""The shared LoRA as an ordinary PEFT adapter folder, written without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.files import write_bytes, write_text
from flexperts.modeling.lora import SHARED_PREFIX, adapter_entries, peft_config

_MODULES, _A = f"{SHARED_PREFIX}model.", ".lora_A.weight"


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; a method without shared LoRA writes nothing.

    The rank is that of the tensors: some methods' global adapter is larger than a client's, at the same scaling.
    Layers of smaller ranks are padded with zeros to the largest.

    Args:
        folder: Where the adapter goes.
        config: Entries of PEFT's configuration of a client's adapter.
        tensors: The adapter's factors by PEFT's names.
    """
    if not tensors:
        return
    rank = max(t.shape[0] for n, t in tensors.items() if ".lora_A." in n)
    resized = {**config, "r": rank, "lora_alpha": config["lora_alpha"] * (rank / config["r"])}
    write_text(folder / "adapter_config.json", json.dumps(resized, indent=2, sort_keys=True))
    weights = save({n: _padded(n, t, rank) for n, t in tensors.items()}, metadata={"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)


def _padded(name: str, factor: Tensor, rank: int) -> Tensor:
    """Return a copy of a factor with zeros up to the rank."""
    is_A = ".lora_A." in name
    missing = rank - factor.shape[0 if is_A else 1]
    return F.pad(factor, (0, 0, 0, missing) if is_A else (0, missing)).contiguous().clone()


def adapter_config(config: RunConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return PEFT's configuration of a client's adapter: the recipe's, on the modules of the tensors."""
    targets = [name.removeprefix(_MODULES).removesuffix(_A) for name in sorted(tensors) if name.endswith(_A)]
    return adapter_entries(peft_config(config.lora, targets), config.model.base)
