"""Which Linear layers LoRA may adapt: exact attention projections, found by rule.

``target_modules="all-linear"`` is not used: on many MoE families PEFT rewrites it through a name map that reaches
every routed expert and the router. Full module names of exact ``nn.Linear`` layers cannot be misread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from flexperts.errors import ConfigError

# Multi-head latent and compressed convolutional attention; as abbreviations they count in capitals only.
_MIXERS = re.compile(r"Attention|Mamba|DeltaNet|ShortConv|LinearAttn|(?-i:MLA|CCA)", re.IGNORECASE)
# Read as bare weights by their model, or renamed by PEFT's v4-to-v5 map: LoRA on them fails or stays dead.
_EXCLUDED = frozenset({"gate_proj", "out_proj", "dt_proj", "o_a_proj"})


def attention_linears(model: nn.Module, projections: Sequence[str] = ()) -> list[str]:
    """Return the full names of the language model's sequence-mixing Linear layers that LoRA may adapt.

    Args:
        model: Any causal language model of transformers.
        projections: Keep only layers with these last names, such as ``("q_proj", "v_proj")``; empty keeps all.
    """
    names = [
        f"{parent}.{child}"
        for parent, module in _mixers(model)
        for child, linear in module.named_children()
        if type(linear) is nn.Linear and child not in _EXCLUDED  # a router may be a subclass that returns a tuple
    ]
    present = sorted({name.rsplit(".", 1)[-1] for name in names})
    missing = sorted(set(projections) - set(present))
    if missing or not names:
        raise ConfigError(
            f"lora.projections = {list(projections)}",
            f"{missing or 'nothing'} is no attention projection of {type(model).__name__}",
            f"choose from {present}" if present else "use a model with attention Linear layers",
        )
    return [name for name in names if not projections or name.rsplit(".", 1)[-1] in projections]


def attention_modules(model: nn.Module) -> list[str]:
    """Return the full names of the sequence-mixing modules, with or without adapters on their Linear layers."""
    return [name for name, module in _mixers(model) if any(hasattr(m, "in_features") for m in module.children())]


def _mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is called like a sequence mixer; decoder layers named after theirs are among it."""
    for name, module in language_modules(model):
        if _MIXERS.search(type(module).__name__):
            yield name, module


def language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the language model, by the names that they have in ``model``.

    Towers for images or sound may hold attention and experts of their own; these stay as they are.

    Args:
        model: A model of transformers, which knows its decoder, or any other module, which is taken whole.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    yield from decoder.named_modules(prefix=prefix)
