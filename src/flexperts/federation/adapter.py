"""The shared LoRA as an ordinary PEFT adapter folder, written without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from flexperts.artifacts import write_bytes, write_text


def write_adapter(folder: Path, config_json: str, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; a method without shared LoRA writes nothing.

    The rank is that of the tensors: some methods' global adapter is larger than a client's, at the same scaling.

    Args:
        folder: Where the adapter goes.
        config_json: PEFT's configuration of a client's adapter.
        tensors: The adapter's factors by PEFT's names.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    if not tensors:
        return
    config = json.loads(config_json)
    rank = next(t.shape[0] for n, t in sorted(tensors.items()) if ".lora_A." in n)
    config["lora_alpha"] *= rank / config["r"]
    config["r"] = rank
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
    weights = save({n: t.contiguous().clone() for n, t in tensors.items()}, metadata={"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)
