"""One personal expert: a frozen pretrained expert, read in place, and a trained update; or a trained copy.

Shapes: T tokens, D expert width, I intermediate, U up-projection width, r rank. Source: FLEx (arXiv 2506.00965);
the low-rank form is that of its released code, computed here on activations: no weight-sized delta ever exists.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from flexperts.moe.layout import ExpertWeights, LayerExperts
from flexperts.parts.part import uniform_matrix

Rank = int | Literal["full"]


class LowRankExpert(nn.Module):
    """E_p(x) with W + (alpha / r) B A for both projections; the frozen W is never copied.

    Args:
        experts: The experts module that holds the frozen expert.
        index: Which of its experts.
        rank: r, at least 1.
        alpha: LoRA's scaling numerator.
        generator: Stream for A; B starts at zero, so training starts from the pretrained expert.
        dropout: Dropout on the input of both pairs while the experts module is in training mode.
    """

    def __init__(
        self,
        experts: LayerExperts,
        index: int,
        rank: int,
        alpha: float,
        generator: Generator,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.experts, self.index, self.scale, self.dropout = experts, index, alpha / rank, dropout
        up, down = ((w.T if experts.is_transposed else w).shape for w in _matrices(self.frozen))
        self.up_lora_A = uniform_matrix(rank, up[1], generator)
        self.up_lora_B = nn.Parameter(torch.zeros(up[0], rank))
        self.down_lora_A = uniform_matrix(rank, down[1], generator)
        self.down_lora_B = nn.Parameter(torch.zeros(down[0], rank))

    @property
    def frozen(self) -> ExpertWeights:
        """The pretrained expert's tensors in the base, as views (same storage)."""
        return self.experts.expert(self.index)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's unweighted output ``[T, D]`` for ``hidden [T, D]``."""
        experts, frozen = self.experts, self.frozen
        projected = experts.project(hidden, frozen.up, frozen.up_bias)
        projected = projected + self._delta(hidden, self.up_lora_A, self.up_lora_B)
        intermediate = experts.activate(projected)
        output = experts.project(intermediate, frozen.down, frozen.down_bias)
        return experts.finish(output + self._delta(intermediate, self.down_lora_A, self.down_lora_B))

    def _delta(self, hidden: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        dropped = F.dropout(hidden, self.dropout, self.experts.module.training)
        low = F.linear(dropped, lora_A.to(hidden.dtype))
        return F.linear(low, lora_B.to(low.dtype)) * self.scale


class FullExpert(nn.Module):
    """E_p as a trainable fp32 copy of the pretrained expert, in the layout of the base's tensors.

    Args:
        experts: The experts module that holds the pretrained expert.
        index: Which of its experts.
    """

    def __init__(self, experts: LayerExperts, index: int) -> None:
        super().__init__()
        self.experts, self.index = experts, index
        for name, tensor in experts.expert(index).items():
            self.register_parameter(name, nn.Parameter(tensor.float().clone()))

    @torch.no_grad()
    def silence(self) -> None:
        """Set the down projection to zero, so that the initial output is zero."""
        for name in ("down", "down_bias"):
            if (parameter := getattr(self, name, None)) is not None:
                parameter.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's unweighted output ``[T, D]`` for ``hidden [T, D]``."""
        copies = dict(self.named_parameters())
        return self.experts.run(hidden, ExpertWeights(**{n: p.to(hidden.dtype) for n, p in copies.items()}))


def personal_expert(
    experts: LayerExperts, index: int, rank: Rank, alpha: float, generator: Generator, dropout: float = 0.0
) -> LowRankExpert | FullExpert:
    """Return a personal expert from expert ``index``: low-rank for an integer ``rank``, a copy for ``"full"``."""
    if rank == "full":
        return FullExpert(experts, index)
    return LowRankExpert(experts, index, rank, alpha, generator, dropout)


def _matrices(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    return weights.up, weights.down
