"""A mixture of LoRA experts on Linear layers: one expert shared by all, and the client's share of a pool.

    y = W x + s (B_s A_s x + sum_{e in Top2} w_e B_e A_e x)        score_e = (A_e x) . (P x) / sqrt(r)

w is the softmax of the scores over the experts that the client holds, cut to the best and scaled to sum 1; no
router depends on the pool's size. s = alpha / r. Shapes: r rank, E experts in use, N experts in the pool.
Source: FedAMoLE (arXiv 2411.19128).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import GraftError
from flexperts.parts.part import Part, Removable, key, submodule, uniform_matrix
from flexperts.seeding import generator


class LoraExpert(nn.Module):
    """The factors of one LoRA expert; B starts at zero.

    Args:
        sizes: (r, in, out).
        seed: The run's seed.
        purpose: Name of A's random stream; equal on every client that holds the expert.
    """

    def __init__(self, sizes: tuple[int, int, int], seed: int, *purpose: str | int) -> None:
        super().__init__()
        rank, in_features, out_features = sizes
        self.A = uniform_matrix(rank, in_features, generator(seed, "lora mixture", *purpose))
        self.B = nn.Parameter(torch.zeros(out_features, rank))


class LayerMixture(nn.Module):
    """The shared expert, the held experts and the token projection of one Linear layer.

    Args:
        name: The layer's name, part of every stream's name.
        sizes: (r, in, out).
        held: Pool numbers of the experts that the client holds here, all different, at least one.
        seed: The run's seed.
        top_k: Experts per token; all held experts if there are fewer.
    """

    def __init__(self, name: str, sizes: tuple[int, int, int], held: Sequence[int], seed: int, top_k: int) -> None:
        super().__init__()
        self.held, self.active, self.top_k = tuple(held), tuple(held), top_k
        self.shared = LoraExpert(sizes, seed, name, "shared")
        self.experts = nn.ModuleDict({str(e): LoraExpert(sizes, seed, name, e) for e in held})
        self.projection = uniform_matrix(sizes[0], sizes[1], generator(seed, "lora mixture", name, "projection"))

    def forward(self, hidden: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the unscaled delta ``[..., out]`` for ``hidden [..., in]``, and the fp32 routing ``[..., E]``.

        With ``dropout``, this share of the experts' input is set to zero; the routing's is whole.
        """
        experts = [cast(LoraExpert, self.experts[str(e)]) for e in self.active]
        stacked_A, stacked_B = torch.cat([e.A for e in experts]), torch.cat([e.B for e in experts], 1)
        low = torch.unflatten(_linear(hidden, stacked_A), -1, (len(experts), -1))
        routing = self._routing(low, _linear(hidden, self.projection))
        if dropout:
            hidden = F.dropout(hidden, dropout)
            low = torch.unflatten(_linear(hidden, stacked_A), -1, (len(experts), -1))
        mixed = low * self._best(routing).unsqueeze(-1).to(low.dtype)
        shared = _linear(_linear(hidden, self.shared.A), self.shared.B)
        return shared + _linear(mixed.flatten(-2), stacked_B), routing

    def _routing(self, low: Tensor, projected: Tensor) -> Tensor:
        """Return the softmax of the scores ``[..., E]`` from ``low [..., E, r]`` and ``projected [..., r]``."""
        scores = (low.float() * projected.float().unsqueeze(-2)).sum(-1) / math.sqrt(low.shape[-1])
        return scores.softmax(-1)

    def _best(self, routing: Tensor) -> Tensor:
        """Return the weights of each token's best experts, scaled to sum 1; the other weights are 0."""
        best = routing.topk(min(self.top_k, routing.shape[-1]), dim=-1)
        weights = best.values / best.values.sum(-1, keepdim=True)
        return torch.zeros_like(routing).scatter(-1, best.indices, weights)


class LoraMixture(Part):
    """All mixtures of one client.

    Args:
        model: The base, with or without PEFT's wrappers around its Linear layers.
        held: Linear module name -> numbers of the pool's experts that the client holds there.
        pool: N, the number of experts in the pool of each layer.
        rank: r of every LoRA expert.
        alpha: Scaling numerator: s = alpha / rank.
        seed: The run's seed; with layer and expert number it determines every A, the same on all clients.
        top_k: Experts per token, without the shared one.
        dropout: Dropout on the experts' input while their module is in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        held: Mapping[str, Sequence[int]],
        *,
        pool: int,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
        top_k: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self._linears = {name: submodule(model, name) for name in held}
        self._balance: dict[str, Tensor] = {}
        # The name is part of the tensor names in run directories: it cannot change.
        self.sites = nn.ModuleDict()
        for name, module in self._linears.items():
            _check_held(name, held[name], pool)
            mixture = LayerMixture(name, (rank, *linear_sizes(name, module)), held[name], seed, top_k)
            self.sites[key(name)] = mixture.to(next(module.parameters()).device)

    @property
    def held(self) -> dict[str, tuple[int, ...]]:
        """The pool's experts that this client holds, by module."""
        return {name: self.mixture(name).held for name in self._linears}

    def activate(self, experts: Mapping[str, Sequence[int]]) -> None:
        """Use only some of the held experts until the next call; modules that are not named do not change."""
        for name, active in experts.items():
            mixture = self.mixture(name)
            if not active or len(set(active)) != len(active) or not set(active) <= set(mixture.held):
                raise GraftError(
                    f"{name}: active experts {list(active)}",
                    f"it holds {list(mixture.held)}",
                    "activate one or more of these, each once",
                )
            mixture.active = tuple(active)

    def mixture(self, name: str) -> LayerMixture:
        """Return the mixture on the module of that name."""
        return cast(LayerMixture, self.sites[key(name)])

    def balance_loss(self) -> Tensor:
        """Return the load-balance loss of the last forward pass in training mode, and forget it.

        It is the authors' release's: the sum over layers of E * sum_e f_e P_e, where f_e is expert e's share of all
        choices (``top_k`` a token) and P_e the mean of softmax's value for e. An even layer adds 1. Padding counts.
        """
        if not self._balance:
            raise GraftError(
                "balance_loss()",
                "there was no forward pass in training mode since the last call",
                "attach the part and run a forward pass in training mode first",
            )
        losses, self._balance = list(self._balance.values()), {}
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def hooks(self) -> Iterator[Removable]:
        """Add every mixture to its module's output."""
        for name, module in self._linears.items():
            yield module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        mixture = self.mixture(name)

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            dropout = self.dropout if module.training else 0.0
            delta, routing = mixture(args[0].to(output.dtype), dropout)
            if module.training:
                self._balance[name] = _balance(routing, mixture.top_k)
            total: Tensor = output + self.scale * delta.to(output.dtype)
            return total

        return add


def _balance(routing: Tensor, top_k: int) -> Tensor:
    """Return E * sum_e f_e P_e of one layer's ``routing [..., E]``; f_e counts each token's ``top_k`` best."""
    flat = routing.flatten(0, -2)
    E = flat.shape[-1]
    chosen = flat.topk(min(top_k, E), dim=-1).indices
    share = F.one_hot(chosen, E).float().mean((0, 1))
    loss: Tensor = E * (share * flat.mean(0)).sum()
    return loss


def _linear(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype))


def linear_sizes(name: str, module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a Linear layer.

    Raises:
        GraftError: The module is not a Linear layer.
    """
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        raise GraftError(
            f"{name} ({type(module).__name__})", "it must be a Linear layer", "name only Linear layers"
        )
    return sizes[0], sizes[1]


def _check_held(name: str, held: Sequence[int], pool: int) -> None:
    if not held or len(set(held)) != len(held) or not set(held) <= set(range(pool)):
        raise GraftError(
            f"{name} holds experts {list(held)}",
            f"they must be different numbers from 0 to {pool - 1}",
            "assign different experts of the pool",
        )
