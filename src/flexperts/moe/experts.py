"""The fused-experts modules of transformers v5, recognised by tensors and flags, never by model name.

Shapes: T tokens, D expert input and output width, I intermediate width, U = 2 I (gated) or I, N experts.

Source: transformers ``integrations/moe.py`` (``use_experts_implementation``), whose contract is
``forward(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import ModelError


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's tensors, as views into the fused ones or as copies of them.

    Args:
        up: ``[U, D]``, or ``[D, U]`` where the layout is transposed.
        down: ``[D, I]``, or ``[I, D]`` where the layout is transposed.
        up_bias: ``[U]`` or None.
        down_bias: ``[D]`` or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the tensors that are present."""
        for name in ("up", "down", "up_bias", "down_bias"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor


@dataclass(frozen=True)
class FusedExperts:
    """A located experts module and how to read one expert out of it.

    Args:
        name: Qualified module name in the model, such as ``model.layers.4.mlp.experts``.
        module: The experts module itself.
    """

    name: str
    module: nn.Module

    @property
    def num_experts(self) -> int:
        """N, the number of routed experts."""
        return cast(int, self.module.num_experts)

    @property
    def has_gate(self) -> bool:
        """Whether the up projection holds gate and up (U = 2 I)."""
        return hasattr(self.module, "gate_up_proj")

    @property
    def is_transposed(self) -> bool:
        """Whether weights are stored input-major, as ``[N, in, out]``."""
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def width(self) -> int:
        """D, read from the tensors: some families run their experts in a latent space."""
        return self.expert(0).up.shape[0 if self.is_transposed else 1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the frozen weights."""
        return self.expert(0).up.dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen weights lie."""
        return self.expert(0).up.device

    def expert(self, index: int) -> ExpertWeights:
        """Return expert ``index`` as detached views into the fused tensors: nothing is copied."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        names = (up, "down_proj", f"{up}_bias", "down_proj_bias")
        fused = (getattr(self.module, name, None) for name in names)
        return ExpertWeights(*(None if t is None else t.detach()[index] for t in fused))  # type: ignore[arg-type]

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply one stored matrix to ``hidden [T, in]`` in the layout's orientation."""
        return F.linear(hidden, weight.T if self.is_transposed else weight, bias)

    def activate(self, projected: Tensor) -> Tensor:
        """Turn the up projection ``[T, U]`` into the intermediate ``[T, I]`` with the module's own rule."""
        module = self.module
        if not self.has_gate:
            return cast(Tensor, module.act_fn(projected))  # type: ignore[operator]
        if hasattr(module, "_apply_gate"):
            return cast(Tensor, module._apply_gate(projected))  # type: ignore[operator]
        gate, up = projected.chunk(2, dim=-1)
        return cast(Tensor, module.act_fn(gate) * up)  # type: ignore[operator]

    def finish(self, output: Tensor) -> Tensor:
        """Apply the norm that a few families put after each expert, to ``[T, D]``."""
        if getattr(self.module, "has_post_expert_norm", False):
            return cast(Tensor, self.module.post_expert_norm(output))  # type: ignore[operator]
        return output

    def run(self, hidden: Tensor, weights: ExpertWeights) -> Tensor:
        """Return one expert's unweighted output ``[T, D]`` for ``hidden [T, D]``."""
        intermediate = self.activate(self.project(hidden, weights.up, weights.up_bias))
        return self.finish(self.project(intermediate, weights.down, weights.down_bias))


def find_experts(model: nn.Module) -> list[FusedExperts]:
    """Return the model's experts modules in the order in which the model holds them.

    Raises:
        ModelError: The model is dense, or some of its experts modules have a layout that cannot be grafted.
    """
    found = [FusedExperts(name, m) for name, m in model.named_modules() if _is_fused_experts(m)]
    inside = tuple(f"{experts.name}." for experts in found)
    refused = [
        f"{name} ({type(m).__name__})"
        for name, m in model.named_modules()
        if _looks_like_experts(m) and not _is_fused_experts(m) and not name.startswith(inside)
    ]
    if refused:
        raise ModelError(
            f"{type(model).__name__} holds {', '.join(refused[:4])}",
            "an experts module must hold fused [N, ...] tensors and take (hidden_states, index, weights)",
            "use a model type of the supported list in the README",
        )
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no experts modules",
            "grafting needs a Mixture-of-Experts model",
            "use a MoE model, or method = 'fedavg', which needs no experts",
        )
    return found


def _is_fused_experts(module: nn.Module) -> bool:
    """Tell whether the tensors and the signature are those of the fused contract."""
    count = getattr(module, "num_experts", None)
    own = dict(module.named_parameters(recurse=False))
    if not isinstance(count, int) or not any(p.dim() == 3 for p in own.values()):
        return False
    if "down_proj" not in own or not ({"gate_up_proj", "up_proj"} & own.keys()):
        return False
    positional = [p for p in inspect.signature(type(module).forward).parameters if p != "self"]
    return all(p.shape[0] == count for p in own.values()) and len(positional) == 3


def _looks_like_experts(module: nn.Module) -> bool:
    """Tell whether a module is meant to hold routed experts, so that a miss is refused and not ignored."""
    holds = any(True for _ in module.named_parameters(recurse=True))
    kind = type(module).__name__
    return holds and kind.endswith(("Experts", "ParallelExperts")) and "Shared" not in kind
