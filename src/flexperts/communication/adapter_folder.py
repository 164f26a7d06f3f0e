"""The shared LoRA as an ordinary PEFT adapter folder, written without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.files import write_bytes, write_text
from flexperts.modeling.lora import SHARED_PREFIX, adapter_entries, peft_config

_MODULES, _A = f"{SHARED_PREFIX}model.", ".lora_A.weight"


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; a method without shared LoRA writes nothing.

    The rank is that of the tensors: some methods' global adapter is larger than a client's, at the same scaling.

    Args:
        folder: Where the adapter goes.
        config: Entries of PEFT's configuration of a client's adapter.
        tensors: The adapter's factors by PEFT's names.
    """
    if not tensors:
        return
    rank = next(t.shape[0] for n, t in sorted(tensors.items()) if ".lora_A." in n)
    resized = {**config, "r": rank, "lora_alpha": config["lora_alpha"] * (rank / config["r"])}
    write_text(folder / "adapter_config.json", json.dumps(resized, indent=2, sort_keys=True))
    weights = save({n: t.contiguous().clone() for n, t in tensors.items()}, metadata={"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)


def adapter_config(config: RunConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return PEFT's configuration of a client's adapter: the recipe's, on the modules of the tensors."""
    targets = [name.removeprefix(_MODULES).removesuffix(_A) for name in sorted(tensors) if name.endswith(_A)]
    return adapter_entries(peft_config(config.lora, targets), config.model.base)
