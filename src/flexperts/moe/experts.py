"""Finding a model's routed experts, by structure, never by model name."""

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
"""No module fits two of them."""


def find_experts(model: nn.Module) -> list[LayerExperts]:
    """Return the routed experts of the language model's layers in the order in which the model holds them.

    Experts that attention is made of, or that a tower for images or sound holds, are left alone.

    Raises:
        ModelError: The model is dense, or some of its experts modules have a layout that cannot be grafted.
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
            f"{type(model).__name__} holds {', '.join(refused[:4])}",
            "an experts module must store and take its experts in a layout that is known",
            "use a model type that docs/models.md lists",
        )
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no experts modules",
            "grafting needs a Mixture-of-Experts model",
            "use a MoE model, or method = 'fedavg', which needs no experts",
        )
    return found


def _recognised(model: nn.Module, name: str, module: nn.Module) -> LayerExperts | None:
    """Return the experts that a module holds in one of the layouts, or None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return next((experts for layout in LAYOUTS if (experts := layout.recognise(name, module, parent))), None)


def _looks_like_experts(module: nn.Module) -> bool:
    """Tell whether a module is meant to hold routed experts, so that a miss is refused and not ignored."""
    holds = any(True for _ in module.parameters())
    kind = type(module).__name__
    return holds and kind.endswith("Experts") and "Shared" not in kind
