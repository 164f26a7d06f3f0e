"""Search for a model's routed experts, by structure, never by model name."""

from __future__ import annotations

from torch import nn

from flexperts.errors import ModelError
from flexperts.moe.attention import attention_modules, language_modules
from flexperts.moe.batched import BatchedExperts
from flexperts.moe.flat import FlatExperts
from flexperts.moe.fused import FusedExperts, FusedExpertsWithIdentities
from flexperts.moe.layout import LayerExperts
from flexperts.moe.parallel import ParallelExperts

LAYOUTS: tuple[type[LayerExperts], ...] = (
    FusedExperts,
    FusedExpertsWithIdentities,
    FlatExperts,
    BatchedExperts,
    ParallelExperts,
)
"""All layouts; no module fits two of them."""


def find_experts(model: nn.Module) -> list[LayerExperts]:
    """Return the routed experts of the language model's layers, in the model's order.

    Experts inside attention, or in a tower for images or sound, are ignored.

    Raises:
        ModelError: The model is dense, or an experts module has an unknown layout.
    """
    found = [experts for name, module in language_modules(model) if (experts := _recognised(model, name, module))]
    inside = tuple(f"{name}." for name in [*(e.name for e in found), *attention_modules(model)])
    taken = {e.module for e in found}
    refused = [
        f"{name} ({type(module).__name__})"
        for name, module in language_modules(model)
        if _looks_like_experts(module) and module not in taken and not name.startswith(inside)
    ]
    if refused:
        raise ModelError(
            f"{type(model).__name__} has {', '.join(refused[:4])}",
            "the layout of an experts module must be one that flexperts knows",
            "use one of the model types in docs/models.md",
        )
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no experts modules",
            "grafting needs a Mixture-of-Experts model",
            "use a MoE model, or method = 'fedavg', which needs no experts",
        )
    return found


def _recognised(model: nn.Module, name: str, module: nn.Module) -> LayerExperts | None:
    """Return a module's experts in the layout that fits, or None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return next((experts for layout in LAYOUTS if (experts := layout.recognise(name, module, parent))), None)


def _looks_like_experts(module: nn.Module) -> bool:
    """Return whether a module seems to contain routed experts; an unknown layout is then refused, not ignored."""
    holds = any(True for _ in module.parameters())
    kind = type(module).__name__
    return holds and kind.endswith("Experts") and "Shared" not in kind
