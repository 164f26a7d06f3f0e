"""A model by its configuration alone: which class of transformers it is, and its shapes without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a configuration.

    Models that see and have a language model inside are often known to another one than language models.
    """
    kind = type(config)
    if kind not in AutoModelForCausalLM._model_mapping and kind in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def skeleton(config: Any, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model with every shape and no value.

    Args:
        config: transformers' configuration.
        dtype: Storage type of the weights, as in a recipe.
        trust_remote_code: Whether code that comes with the base may run.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
