"""The shared LoRA as an ordinary PEFT adapter folder, written without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flexperts.errors import incompatible
from flexperts.files import write_bytes, write_text


def write_adapter(folder: Path, config_json: str, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; a method without shared LoRA writes nothing.

    The rank is that of the tensors: some methods' global adapter is larger than a client's, at the same scaling.

    Args:
        folder: Where the adapter goes.
        config_json: PEFT's configuration of a client's adapter.
        tensors: The adapter's factors by PEFT's names.
    """
    if not tensors:
        return
    rank = next(t.shape[0] for n, t in sorted(tensors.items()) if ".lora_A." in n)
    write_text(folder / "adapter_config.json", json.dumps(_of_rank(rank, config_json), indent=2, sort_keys=True))
    weights = save({n: t.contiguous().clone() for n, t in tensors.items()}, metadata={"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)


def _of_rank(rank: int, config_json: str) -> dict[str, Any]:
    try:
        config = dict(json.loads(config_json))
        return config | {"r": rank, "lora_alpha": float(config["lora_alpha"]) * (rank / int(config["r"]))}
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise incompatible(
            f"adapter configuration {config_json[:80]!r}", f"it holds PEFT's r and lora_alpha ({error!r})"
        ) from error
