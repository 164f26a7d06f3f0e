"""Loading the frozen base and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flexperts.base.build import resolve_base
from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.parameters.fingerprint import fingerprint


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory.

    Args:
        model: The causal language model, every parameter frozen, in eval mode.
        tokenizer: Its tokenizer.
        fingerprint: Names the weights.
        source: The folder or hub id it came from.
    """

    model: Any
    tokenizer: Any
    fingerprint: str
    source: str


def load_base(config: ModelConfig) -> LoadedBase:
    """Load the base that a recipe names, building a shipped one on first use.

    Raises:
        ModelError: Nothing can be loaded under that name, or the device does not exist.
    """
    device = _device(config.device)
    source = resolve_base(config.base)
    transformers_logging.disable_progress_bar()  # transformers' bar would fight with the run's own display
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, config.dtype))
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.base = {config.base!r}",
            f"it cannot be loaded ({first_line})",
            "check the name and the network",
        ) from error
    _freeze(model)
    return LoadedBase(model, tokenizer, fingerprint(model), source)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.device = {name!r}", f"torch cannot use it ({reason})", "use auto or cpu"
        ) from error


def _freeze(model: Any) -> None:
    model.requires_grad_(False)
    model.eval()
    # With frozen routers, a load-balancing term in the loss would train nothing it is meant to.
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
