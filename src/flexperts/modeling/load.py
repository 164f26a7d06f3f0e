"""Loading the frozen base and its tokenizer."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flexperts.config.model import ModelConfig
from flexperts.errors import ModelError
from flexperts.modeling.memory import free_bytes
from flexperts.modeling.placement import computing_device, pin_offloaded, placement, start_on
from flexperts.modeling.quantization import (
    ExpertsQuantization,
    check_quantized,
    check_quantizer,
    dequantizing,
)
from flexperts.modeling.skeleton import auto_class
from flexperts.moe.dispatch import BY_PAIRS
from flexperts.moe.experts import find_experts
from flexperts.moe.flat import FlatExperts
from flexperts.observer import current_observer, libraries_drawing
from flexperts.parameters.fingerprint import fingerprint
from flexperts.parameters.finite import first_not_finite
from flexperts.smol_moe.build import resolve_base


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory.

    Args:
        model: The causal language model in eval mode, with all parameters frozen.
        tokenizer: The base's tokenizer.
        fingerprint: Hash that identifies the weights.
        source: The folder or hub id from which the base was loaded.
    """

    model: Any
    tokenizer: Any
    fingerprint: str
    source: str


def load_tokenizer(config: ModelConfig) -> tuple[Any, Any]:
    """Load the tokenizer and transformers' configuration of the base that a recipe names."""
    source, trusted = resolve_base(config.base), config.trust_remote_code
    _check_readable(Path(source))
    try:
        with _library_bars(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
            return tokenizer, AutoConfig.from_pretrained(source, trust_remote_code=trusted)
    except _UNLOADABLE as error:
        raise _refused(config.base, error) from error


def load_base(config: ModelConfig, tokenizer: Any = None) -> LoadedBase:
    """Load the base that a recipe names; a shipped base is built on first use.

    Every tensor is read in its storage type directly to its device, and quantized there if the recipe says so.

    Args:
        config: Which base, and how it is stored.
        tokenizer: The base's tokenizer, if it is already in memory.
    """
    device = computing_device(config.device)
    current_observer().stage(f"loading {config.base}")
    source = resolve_base(config.base)
    # Silence its table of keys, which _check_complete reports, and warnings about tensor parallelism.
    for name in ("modeling_utils", "distributed.tensor_parallel"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    _check_readable(Path(source))
    _check_weights(Path(source))
    # Otherwise a hub repository without safetensors would be converted by a service, and its result loaded.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    trusted = config.trust_remote_code
    try:
        with _library_bars(source):
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
                **_experts(config, described, device),
            )
    except ModelError:
        raise
    except _UNLOADABLE as error:
        with suppress(SafetensorError):  # damaged files are reported by the error below
            _check_names(_lacking(Path(source)), _RANDOM, config.base)
        if _is_of_memory(error):
            raise _too_large(config, device) from error
        raise _refused(config.base, error) from error
    _check_complete(model, described, found, config.base)
    if config.quantization != "none":
        check_quantized(model, config.base)
    _check_finite(model, config.base)
    _freeze(model)
    _let_go_of_files(model)
    _keep_rows_together(model)
    _weigh_in_one_type(model)
    start_on(model, device)
    pin_offloaded(model)
    return LoadedBase(model, tokenizer, fingerprint(model), source)


@contextmanager
def _library_bars(source: str) -> Iterator[None]:
    """Let the hub and transformers draw their bars for a base from the hub; hide them for a folder, or in a log."""
    if Path(source).is_dir() or sys.stderr is None or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # the hub's, too
        yield
        return
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        transformers_logging.enable_progress_bar()
    with libraries_drawing():
        yield


_UNLOADABLE = (
    OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, ImportError, SafetensorError,
    MemoryError,
)  # fmt: skip


_RANDOM = "its files lack weights of the model, which would then be random"
_MOST_NAMED = 5


def _check_complete(model: Any, described: Any, found: Mapping[str, Iterable[Any]], base: str) -> None:
    """Refuse weights that are not exactly the model's."""
    inside = {name for name, _ in model.named_children()}
    # Of a multimodal model, only the language model may be loaded; the files also contain the other parts.
    whole = described.get_text_config() is described
    extra = [name for name in found["unexpected_keys"] if whole or name.partition(".")[0] in inside]
    _check_names(found["missing_keys"], _RANDOM, base)
    _check_names(extra, "its files contain weights that the model does not have", base)
    misshapen = [name for name, *_ in found["mismatched_keys"]]
    _check_names(misshapen, "its files contain weights with other shapes than the model's", base)


def _check_names(names: Iterable[str], rule: str, base: str) -> None:
    if told := sorted(names):
        more = f" and {len(told) - _MOST_NAMED} more" if told[_MOST_NAMED:] else ""
        raise ModelError(
            f"model.base = {base!r}: {', '.join(told[:_MOST_NAMED])}{more}",
            rule,
            "download or save the base again, with the config.json that belongs to its weights",
        )


def _lacking(folder: Path) -> Iterator[str]:
    """Yield the weights that are missing for some experts of a layer and present for others.

    transformers fuses experts while it reads them, and cannot report which weight was missing.
    """
    groups: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if match := _NUMBERED.fullmatch(name):
                    groups[match[1]][match[3]].add(match[2])
    for before, kinds in groups.items():
        everyone = set().union(*kinds.values())
        yield from (f"{before}{number}{after}" for after, some in kinds.items() for number in everyone - some)


_NUMBERED = re.compile(r"(.+\.)(\d+)(\.\D+)")
"""The name of a weight in a numbered part: text before the number, the number, text after it."""


def _check_readable(folder: Path) -> None:
    """Refuse a local base that another user saved for itself; libraries then say that files are missing."""
    if folder.is_dir() and (closed := [path for path in folder.iterdir() if not os.access(path, os.R_OK)]):
        raise ModelError(
            f"base file {str(min(closed))!r}",
            "this user cannot read it (safetensors files are made with mode 0600)",
            f"run chmod -R a+rX {folder}",
        )


def _check_weights(folder: Path) -> None:
    """Refuse a local base without safetensors: pickled weights can run any code."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        raise ModelError(
            f"base folder {str(folder)!r}",
            f"its weights must be safetensors files ({'only ' + found[0] if found else 'it has none'})",
            "save the model in this folder with save_pretrained of a current transformers version",
        )


def _check_finite(model: Any, base: str) -> None:
    if (name := first_not_finite(model)) is not None:
        raise ModelError(
            f"model.base = {base!r}: {name}",
            "it contains NaN or infinity, and a base's weights must be finite numbers",
            "download its files again, or use another base",
        )


def _is_of_memory(error: Exception) -> bool:
    """Return whether there was too little memory; torch's allocator for CPUs says so in its text only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _too_large(config: ModelConfig, device: torch.device) -> ModelError:
    return ModelError(
        f"model.base = {config.base!r}",
        f"{device} has too little memory to load it ({free_bytes(device) / 1e9:.1f} GB are free now)",
        "set model.quantization = 'nf4', or keep experts elsewhere with model.device_map = 'auto' and "
        "model.max_memory, or use a device with more memory",
    )


def _refused(base: str, error: Exception) -> ModelError:
    said = str(error).strip() or type(error).__name__
    if "trust_remote_code" in said:
        return ModelError(
            f"model.base = {base!r}",
            "it needs its own Python code to run",
            "set model.trust_remote_code = true if you trust its author, and add --trust-remote-code",
        )
    reason = f"it cannot be loaded ({said.splitlines()[0]})"
    return ModelError(
        f"model.base = {base!r}",
        reason,
        "check the name, the network, and that $HF_HOME is writable",
    )


def _experts(config: ModelConfig, described: Any, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for how routed experts are stored and computed."""
    on_card = device.type != "cpu"
    way = {"experts_implementation": BY_PAIRS} if on_card else {}
    if config.quantization == "none":
        return {**dequantizing(described, config.base, asked=config.dequantize), **way}
    check_quantizer(described, config.base)
    # transformers' eager loop has the values of one expert in memory at a time. On a card it would wait for the
    # host at each of them: there a layer's experts, or those that a decoding step needs, get their values at once.
    way = way or {"experts_implementation": "eager"}
    return {"quantization_config": ExpertsQuantization(config.quantization), **way}


def _freeze(model: Any) -> None:
    model.requires_grad_(False)
    model.eval()
    # Routers are frozen, so a load-balancing term in the loss would have no use.
    text = model.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False


def _let_go_of_files(model: Any) -> None:
    """Copy all weights other than experts out of the memory-mapped files.

    Tensors on a CPU are read in place from files. Experts that are stored one by one were fused in memory, and the
    other weights would keep the whole files mapped: the process would seem to have the model in memory twice.
    """
    try:
        experts = {id(p) for e in find_experts(model) for p in e.stored}
    except ModelError:  # no experts, or an unknown layout: a method that needs experts reports it
        return
    for parameter in model.parameters():
        if id(parameter) not in experts and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _weigh_in_one_type(model: Any) -> None:
    """Give flat experts the router's weights in the type of the hidden states.

    Under CUDA's autocast a softmax is in fp32, and these experts add the weighted outputs to a sum in the hidden
    states' type, which torch refuses.
    """
    with suppress(ModelError):  # no experts, or an unknown layout: a method that needs experts reports it
        for experts in find_experts(model):
            if isinstance(experts, FlatExperts):
                experts.module.register_forward_pre_hook(
                    lambda _module, args: (*args[:2], args[2].to(args[0].dtype))
                )


def _keep_rows_together(model: Any) -> None:
    """Make the input of the vocabulary projection contiguous.

    transformers passes a slice with each row's last column. On such a slice, torch on a CPU copies the projection's
    matrix once per row: gigabytes and minutes with a large vocabulary.
    """
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
