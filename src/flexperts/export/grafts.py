"""Personal experts next to the routed ones of a Mixture-of-Experts model of transformers. Needs only torch.

    y = sum_{j in TopK} g_j(x) E_j(x)  +  sum_p c_p sigmoid(G_p(x)) E_p(x)

The model computes the first sum; a hook on each experts module adds the second one, with E_p(x) - E_s(x) instead of
E_p(x) where the layout names an expert s of the model. The experts module tells whether the up projection contains
a gate, how weights are stored and what follows an expert.

Shapes: T tokens, D expert width, k personal experts. Made by flexperts, which copies this file into its exports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExportedGraft(nn.Module):
    """The k personal experts and the gate of one layer.

    Args:
        experts: The layer's experts module, with fused tensors ``[N, ...]``.
        scales: c, a constant factor for each personal expert.
        minus: For each personal expert, the expert whose output is subtracted from its output, or None.
    """

    down: Tensor

    def __init__(self, experts: nn.Module, scales: Sequence[float], minus: Sequence[int | None]) -> None:
        super().__init__()
        self.scales, self.minus = list(scales), list(minus)
        up = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        self.fused = {"up": up, "down": "down_proj", "up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
        for name, source in self.fused.items():
            tensor = getattr(experts, source, None)
            empty = None if tensor is None else nn.Parameter(tensor.new_zeros(len(scales), *tensor.shape[1:]))
            self.register_parameter(name, empty)
        width = self.down.shape[2 if _is_transposed(experts) else 1]
        self.gate_weight = nn.Parameter(self.down.new_zeros(len(scales), width))
        self.gate_bias = nn.Parameter(self.down.new_zeros(len(scales)))

    def forward(self, experts: Any, hidden: Tensor) -> Tensor:
        """Return the sum of the personal experts' gated outputs, ``[T, D]`` for ``hidden [T, D]``."""
        gates = torch.sigmoid(_linear(hidden, self.gate_weight, self.gate_bias)).unsqueeze(-1).unbind(-2)
        # A factor of 1 is left out, as in training, so that results are bit-equal.
        factors = [gate if c == 1 else gate * c for gate, c in zip(gates, self.scales, strict=True)]
        terms = [factor * self._output(experts, p, hidden) for p, factor in enumerate(factors)]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def add(self, experts: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the graft's output; this is the forward hook of the experts module."""
        added: Tensor = self(experts, args[0])
        return output + added.to(output.dtype)

    def _output(self, experts: Any, p: int, hidden: Tensor) -> Tensor:
        output, minus = _run(experts, {name: _row(self, name, p) for name in self.fused}, hidden), self.minus[p]
        if minus is None:
            return output
        frozen = {name: _row(experts, source, minus) for name, source in self.fused.items()}
        return output - _run(experts, frozen, hidden)


def hang_grafts(model: nn.Module, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Attach grafts to a model; ``layout`` maps the name of an experts module to ``scales`` and ``minus``."""
    for name, settings in layout.items():
        experts = model.get_submodule(name)
        experts.graft = graft = ExportedGraft(experts, **settings)
        experts.register_forward_hook(graft.add)


def _run(experts: Any, weights: Mapping[str, Tensor | None], hidden: Tensor) -> Tensor:
    """Return one expert's output ``[T, D]``."""
    for name in ("up", "down"):
        weight: Any = weights[name]
        hidden = _linear(hidden, weight.T if _is_transposed(experts) else weight, weights[f"{name}_bias"])
        hidden = _activate(experts, hidden) if name == "up" else hidden
    return experts.post_expert_norm(hidden) if getattr(experts, "has_post_expert_norm", False) else hidden


def _row(module: nn.Module, name: str, index: int) -> Tensor | None:
    """Return one expert's tensor of a fused one, or None if there is no such tensor."""
    tensor = getattr(module, name, None)
    return None if tensor is None else tensor[index]


def _activate(experts: Any, projected: Tensor) -> Any:
    if not hasattr(experts, "gate_up_proj"):
        return experts.act_fn(projected)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(projected)
    gate, up = projected.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
