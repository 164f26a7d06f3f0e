"""Loading the frozen base and its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
        ModelError: Nothing can be loaded under that name, it holds no safetensors, its own code would have to run
            and ``trust_remote_code`` is off, or the device does not exist.
    """
    device = _device(config.device)
    source = resolve_base(config.base)
    transformers_logging.disable_progress_bar()  # transformers' bar would fight with the run's own display
    _check_weights(Path(source))
    # A hub repository without safetensors would be converted by a service and loaded from what that one returns.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    trusted = config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), trust_remote_code=trusted, use_safetensors=True
        )
        model = model.to(device)
    except _UNLOADABLE as error:
        raise _refused(config.base, error) from error
    _freeze(model)
    return LoadedBase(model, tokenizer, fingerprint(model), source)


_UNLOADABLE = (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, ImportError, SafetensorError)


def _check_weights(folder: Path) -> None:
    """Refuse a local base whose weights are pickled, which could hold any code."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        raise ModelError(
            f"base folder {str(folder)!r}",
            f"it must hold its weights as safetensors ({'only ' + found[0] if found else 'it holds none'})",
            "save it there with save_pretrained of a present transformers",
        )


def _refused(base: str, error: Exception) -> ModelError:
    said = str(error).strip() or type(error).__name__
    if "trust_remote_code" in said:
        return ModelError(
            f"model.base = {base!r}",
            "it needs Python code of its own to run",
            "set model.trust_remote_code = true if you trust whoever made it",
        )
    reason = f"it cannot be loaded ({said.splitlines()[0]})"
    return ModelError(f"model.base = {base!r}", reason, "check the name and the network")


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
