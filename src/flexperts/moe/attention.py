"""The Linear layers that LoRA may adapt: attention projections, found by rule.

``target_modules="all-linear"`` is not used: on many MoE families PEFT rewrites it through a name map that includes
every routed expert and the router. Full module names of exact ``nn.Linear`` layers are unambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from flexperts.errors import ConfigError

# MLA and CCA are multi-head latent and compressed convolutional attention; they match in capitals only.
_MIXERS = re.compile(r"Attention|Mamba|DeltaNet|ShortConv|LinearAttn|(?-i:MLA|CCA)", re.IGNORECASE)
# Their model uses only the weights, or PEFT's v4-to-v5 map renames them: LoRA on them fails or has no effect.
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
            f"{type(model).__name__} has no attention projection {missing}"
            if missing
            else f"{type(model).__name__} has no attention projections",
            f"choose from {present}" if present else "use a model whose attention has Linear layers",
        )
    return [name for name in names if not projections or name.rsplit(".", 1)[-1] in projections]


def attention_modules(model: nn.Module) -> list[str]:
    """Return the full names of the sequence-mixing modules, with or without adapters on their Linear layers."""
    return [name for name, module in _mixers(model) if any(hasattr(m, "in_features") for m in module.children())]


def _mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules whose class is named like a sequence mixer; some decoder layers have such names too."""
    for name, module in language_modules(model):
        if _MIXERS.search(type(module).__name__):
            yield name, module


def language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the language model, with their names in ``model``.

    Towers for images or sound are left out, though they may have attention and experts too.

    Args:
        model: A model of transformers, of which the decoder is used, or any other module, which is used as a whole.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    yield from decoder.named_modules(prefix=prefix)
