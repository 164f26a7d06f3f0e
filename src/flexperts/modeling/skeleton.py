"""A model from its configuration only: its class in transformers, and its shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a configuration.

    Multimodal models with a language model inside are often registered with another auto class.
    """
    kind = type(config)
    if kind not in AutoModelForCausalLM._model_mapping and kind in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def skeleton(config: Any, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device: with all shapes and no values.

    Args:
        config: transformers' configuration.
        dtype: Storage type of the weights, as in a recipe.
        trust_remote_code: Whether code from the base's files may run.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
