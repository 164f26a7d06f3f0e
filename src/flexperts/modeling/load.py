"""Loading the frozen base and its tokenizer."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.modeling.placement import computing_device, placement
from flexperts.modeling.quantization import ExpertsQuantization, check_quantized, check_quantizer
from flexperts.modeling.skeleton import auto_class
from flexperts.moe.experts import find_experts
from flexperts.parameters.fingerprint import fingerprint
from flexperts.parameters.finite import first_not_finite
from flexperts.smol_moe.build import resolve_base


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


def load_tokenizer(config: ModelConfig) -> tuple[Any, Any]:
    """Load the tokenizer of the base that a recipe names, and transformers' configuration of the base."""
    source, trusted = resolve_base(config.base), config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        return tokenizer, AutoConfig.from_pretrained(source, trust_remote_code=trusted)
    except _UNLOADABLE as error:
        raise _refused(config.base, error) from error


def load_base(config: ModelConfig, tokenizer: Any = None) -> LoadedBase:
    """Load the base that a recipe names, building a shipped one on first use.

    Every tensor is read in its storage type straight to its place, and quantized there where the recipe says so.

    Args:
        config: Which base, and how it is stored.
        tokenizer: Its tokenizer, where that is in memory already.
    """
    device = computing_device(config.device)
    source = resolve_base(config.base)
    transformers_logging.disable_progress_bar()  # transformers' bar would fight with the run's own display
    # Its table of keys, which _check_complete tells in a line, and rules for clusters that a base has no use for.
    for name in ("modeling_utils", "distributed.tensor_parallel"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    _check_weights(Path(source))
    # A hub repository without safetensors would be converted by a service and loaded from what that one returns.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    trusted = config.trust_remote_code
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        described = AutoConfig.from_pretrained(source, trust_remote_code=trusted)
        model, found = auto_class(described).from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=trusted,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **placement(config, described, device),
            **_quantization(config, described),
        )
    except ModelError:
        raise
    except _UNLOADABLE as error:
        with suppress(SafetensorError):  # damaged files are told as such
            _check_names(_lacking(Path(source)), _RANDOM, config.base)
        raise _refused(config.base, error) from error
    _check_complete(model, described, found, config.base)
    if config.quantization != "none":
        check_quantized(model, config.base)
    _check_finite(model, config.base)
    _freeze(model)
    _let_go_of_files(model)
    _keep_rows_together(model)
    return LoadedBase(model, tokenizer, fingerprint(model), source)


_UNLOADABLE = (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, ImportError, SafetensorError)


_RANDOM = "its files lack weights of the model, which would be random at every start"
_MOST_NAMED = 5


def _check_complete(model: Any, described: Any, found: Mapping[str, Iterable[Any]], base: str) -> None:
    """Refuse weights that are not exactly the model's."""
    inside = {name for name, _ in model.named_children()}
    # Of a model that also sees or hears, the language model alone may be loaded; the files hold the rest too.
    whole = described.get_text_config() is described
    extra = [name for name in found["unexpected_keys"] if whole or name.partition(".")[0] in inside]
    _check_names(found["missing_keys"], _RANDOM, base)
    _check_names(extra, "its files hold weights that the model has no place for", base)
    misshapen = [name for name, *_ in found["mismatched_keys"]]
    _check_names(misshapen, "its files hold weights of other shapes than the model's", base)


def _check_names(names: Iterable[str], rule: str, base: str) -> None:
    if told := sorted(names):
        more = f" and {len(told) - _MOST_NAMED} more" if told[_MOST_NAMED:] else ""
        raise ModelError(
            f"model.base = {base!r}: {', '.join(told[:_MOST_NAMED])}{more}",
            rule,
            "download or save the base again, with the config.json that belongs to its weights",
        )


def _lacking(folder: Path) -> Iterator[str]:
    """Yield the weights that some experts have in a folder's files and others of the same layer have not.

    transformers puts experts together while it reads them, and cannot say which weight it missed.
    """
    groups: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dictionary
                if match := _NUMBERED.fullmatch(name):
                    groups[match[1]][match[3]].add(match[2])
    for before, kinds in groups.items():
        everyone = set().union(*kinds.values())
        yield from (f"{before}{number}{after}" for after, some in kinds.items() for number in everyone - some)


_NUMBERED = re.compile(r"(.+\.)(\d+)(\.\D+)")
"""A weight of one of several equal parts: what is before the part's number, the number, what is behind it."""


def _check_weights(folder: Path) -> None:
    """Refuse a local base whose weights are pickled, which could hold any code."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        raise ModelError(
            f"base folder {str(folder)!r}",
            f"it must hold its weights as safetensors ({'only ' + found[0] if found else 'it holds none'})",
            "save it there with save_pretrained of a present transformers",
        )


def _check_finite(model: Any, base: str) -> None:
    if (name := first_not_finite(model)) is not None:
        raise ModelError(
            f"model.base = {base!r}: {name}",
            "it holds NaN or infinity, and a base's weights are finite numbers",
            "get its files anew, or use another base",
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
    return ModelError(
        f"model.base = {base!r}",
        reason,
        "check name and network, and that $HF_HOME can be written",
    )


def _quantization(config: ModelConfig, described: Any) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told about quantization."""
    if config.quantization == "none":
        return {}
    check_quantizer(described, config.base)
    # transformers' own loop takes experts one by one: no more than one is dequantized at a time.
    return {
        "quantization_config": ExpertsQuantization(config.quantization),
        "experts_implementation": "eager",
    }


def _freeze(model: Any) -> None:
    model.requires_grad_(False)
    model.eval()
    # With frozen routers, a load-balancing term in the loss would train nothing it is meant to.
    text = model.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False


def _let_go_of_files(model: Any) -> None:
    """Copy what is small out of the mapped files.

    Tensors on a CPU are read in place from files. Where experts are stored one by one, they have been put together
    in memory by now, and the rest would keep whole files mapped: the process would seem to hold the model twice.
    """
    try:
        experts = {id(p) for e in find_experts(model) for p in e.stored}
    except ModelError:  # a dense model, or one whose experts cannot be read: a method that needs them says so
        return
    for parameter in model.parameters():
        if id(parameter) not in experts and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _keep_rows_together(model: Any) -> None:
    """Give the vocabulary's projection whole rows.

    On the slice that transformers takes of each row's last column, torch on a CPU copies the projection's matrix
    once per row: gigabytes and minutes with a large vocabulary.
    """
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
