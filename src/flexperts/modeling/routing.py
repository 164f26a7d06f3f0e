"""Routing of tokens in each layer in one model state, and how much it differs from the unchanged base.

Padding never counts. With frozen routers, only attention changes a token's routing, through its hidden state.
Shapes: T tokens, K experts per token, N experts, D' width of the router's input. Entropies and divergences in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import entr, kl_div
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.data.batches import PaddedBatch
from flexperts.errors import ModelError
from flexperts.modeling.forward import Precision
from flexperts.modeling.recording import record
from flexperts.moe.layout import LayerExperts
from flexperts.moe.router import Router, find_router

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing of tokens; all tensors are on the CPU.

    The full distribution has the same definition in every family: the softmax over all N logits W x (+ b) of the
    router, in fp32 from its input. Softmax routers choose its K largest values (except for near ties in bf16).
    Routers that score by sigmoid order experts in the same way. Correction biases, groups and temperatures, which
    some families also use to choose, are not included.

    Args:
        index: ``[T, K]``, the chosen experts.
        weight: ``[T, K]`` fp32, the weights of the chosen experts.
        experts: ``N``.
        probabilities: ``[T, N]`` fp32, the full distribution; None where the router's matrix cannot be found.
    """

    index: Tensor
    weight: Tensor
    experts: int
    probabilities: Tensor | None = None


@dataclass
class RoutingRecorder:
    """Recorder of one layer's routing.

    It reads what the router passes to the experts module, before a part reduces the experts (``restrict``).

    Args:
        experts: The layer's experts module.
        router: The layer's router, or None where it cannot be found.
    """

    experts: LayerExperts
    router: Router | None
    _index: list[Tensor] = field(default_factory=list)
    _weight: list[Tensor] = field(default_factory=list)
    _probabilities: list[Tensor] = field(default_factory=list)

    def hooks(self, mask: Tensor) -> Iterator[RemovableHandle]:
        """Register hooks on router and experts module for one pass."""

        def chosen(_hidden: Tensor, index: Tensor, weight: Tensor, _output: Tensor) -> None:
            self._index.append(_kept(index, mask).cpu())
            self._weight.append(_kept(weight, mask).float().cpu())

        yield from self.experts.watch(chosen)
        if self.router is not None:
            yield self.router.module.register_forward_pre_hook(self._scored(self.router, mask))

    def result(self) -> LayerRouting:
        """Return the recorded routing, in the order of the batches' rows."""
        # A router may never be called, if other modules use its matrix: then there are no probabilities.
        full = torch.cat(self._probabilities) if self._probabilities else None
        return LayerRouting(torch.cat(self._index), torch.cat(self._weight), self.experts.num_experts, full)

    def _scored(self, router: Router, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def scored(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Autocast would compute the product in bf16.
            with torch.autocast(mask.device.type, enabled=False):
                logits = F.linear(_kept(args[0], mask).float(), router.weight.float(), _bias(router))
            self._probabilities.append(logits.softmax(-1).cpu())

        return scored


def routing_recorders(model: nn.Module, experts: Sequence[LayerExperts]) -> dict[str, RoutingRecorder]:
    """Return a recorder for every experts module of ``model``, by the module's name."""
    return {e.name: RoutingRecorder(e, _router(model, e)) for e in experts}


def record_routing(
    model: Any,
    experts: Sequence[LayerExperts],
    batches: Iterable[PaddedBatch],
    precision: Precision,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> dict[str, LayerRouting]:
    """Return every layer's routing of the batches' tokens, by experts module.

    Args:
        model, batches, precision, on_batch: As for ``record``; at least one batch.
        experts: The model's experts modules.
    """
    recorders = routing_recorders(model, experts)
    record(model, list(recorders.values()), batches, precision, on_batch)
    return {name: recorder.result() for name, recorder in recorders.items()}


def summarize_routing(now: LayerRouting, base: LayerRouting | None = None) -> dict[str, Any]:
    """Return a layer's routing in numbers, as plain JSON values with six significant digits.

    A slot with weight exactly 0, or with an index beyond the experts, selects nothing; a few families skip experts
    in this way. "tokens": T. "utilisation" [N]: share of all selections. "mean_weight" [N]: mean router weight over
    all tokens. "entropy": mean over tokens of the full distribution's entropy, or, where "full" is false, that of
    the K weights scaled to sum 1. "load_entropy": the utilisation's entropy over log N; 1 is even. "dead": the
    experts that no token selects. "co_selection" [N][N]: share of tokens that select both experts, on the diagonal
    the one expert (four digits).
    Against the base: "agreement", the mean share of a token's experts that are the same; "divergence", the mean
    Jensen-Shannon divergence of the full distributions, None where one is missing; "utilisation_divergence", the
    Jensen-Shannon divergence of the utilisations.

    Args:
        now: The routing to describe.
        base: The routing of the unchanged base on the same tokens in the same order; without it, the numbers
            against the base are left out.
    """
    selected, load = _selected(now), _utilisation(now)
    together = selected.T @ selected / len(selected)
    numbers = {
        "tokens": len(selected),
        "utilisation": _digits(load),
        "mean_weight": _digits(_mean_weight(now)),
        "entropy": _digits(entr(_distribution(now)).sum(1).mean()),
        "full": now.probabilities is not None,
        "load_entropy": _digits(entr(load).sum() / np.log(now.experts)) if now.experts > 1 else 1.0,
        "dead": np.flatnonzero(load == 0).tolist(),
        "co_selection": _digits(together, 4),
    }
    return numbers | (_against(now, base) if base else {})


def _against(now: LayerRouting, base: LayerRouting) -> dict[str, Any]:
    ours, theirs = _selected(now), _selected(base)
    most = np.maximum(ours.sum(1), theirs.sum(1))
    # A token that selects no expert in either state agrees.
    same = np.divide((ours * theirs).sum(1), most, out=np.ones_like(most), where=most > 0)
    full = now.probabilities is not None and base.probabilities is not None
    return {
        "agreement": _digits(same.mean()),
        "divergence": _digits(_jensen_shannon(_distribution(now), _distribution(base)).mean()) if full else None,
        "utilisation_divergence": _digits(_jensen_shannon(_utilisation(now), _utilisation(base))),
    }


def _jensen_shannon(p: Floats, q: Floats) -> Floats:
    """Return the divergence along the last axis; SciPy's is NaN where p and q differ only by rounding."""
    middle = (p + q) / 2
    total: Floats = (kl_div(p, middle) + kl_div(q, middle)).sum(-1) / 2
    return total.clip(0)


def _selected(routing: LayerRouting) -> Floats:
    """Return ``[T, N]``, 1 where a token selects an expert."""
    taken = np.zeros((len(routing.index), routing.experts))
    token, slot = np.nonzero(_used(routing))
    taken[token, routing.index.numpy()[token, slot]] = 1
    return taken


def _used(routing: LayerRouting) -> NDArray[np.bool_]:
    """Return ``[T, K]``, true for slots that select an expert."""
    used: NDArray[np.bool_] = ((routing.index < routing.experts) & (routing.weight != 0)).numpy()
    return used


def _utilisation(routing: LayerRouting) -> Floats:
    counts = _selected(routing).sum(0)
    share: Floats = counts / max(counts.sum(), 1)
    return share


def _mean_weight(routing: LayerRouting) -> Floats:
    used = _used(routing)
    index, weight = routing.index.numpy()[used], routing.weight.double().numpy()[used]
    return np.bincount(index, weight, minlength=routing.experts) / len(routing.index)


def _distribution(routing: LayerRouting) -> Floats:
    """Return the full distribution ``[T, N]``, or the chosen experts' ``[T, K]``, in float64 with sum 1."""
    full = routing.probabilities
    values: Floats = (routing.weight if full is None else full).double().abs().numpy()
    scaled: Floats = values / values.sum(1, keepdims=True).clip(np.finfo(np.float64).tiny)
    return scaled


def _digits(value: Any, digits: int = 6) -> Any:
    """Return a number, or nested lists of numbers, rounded to significant digits."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [_digits(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}")


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of ``values`` (``[B * S, ...]`` or ``[B, S, ...]``) that are tokens, not padding."""
    return values.reshape(-1, values.shape[-1])[mask]


def _router(model: nn.Module, experts: LayerExperts) -> Router | None:
    try:
        return find_router(model, experts)
    except ModelError:
        return None


def _bias(router: Router) -> Tensor | None:
    bias = getattr(router.module, "bias", None)
    return bias.float() if isinstance(bias, Tensor) else None
