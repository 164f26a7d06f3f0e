"""LoRA experts on Linear layers, mixed for every token by a linear router over slots.

    y = W x + s sum_k w_k B_{e(k)} A_{e(k)} x        w = softmax(R x) over the slots

A slot names an expert, and several slots may name the same one. w is cut to each token's best slots and scaled to
sum 1. s = alpha / r. Shapes: r rank, E experts in use, K slots in use.
Source: FedALT (arXiv 2503.11880), FedLEASE (arXiv 2509.15087).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexperts.errors import GraftError
from flexperts.parts.lora_mixture import LoraExpert, linear_sizes
from flexperts.parts.part import Part, Removable, key, submodule, uniform_matrix
from flexperts.seeding import generator


class RoutedLayer(nn.Module):
    """The experts and the router of one Linear layer.

    Args:
        name: The layer's name, part of every stream's name.
        sizes: (r, in, out).
        experts: Number of experts.
        slots: Number of the router's rows, one per slot.
        seed: The run's seed.
    """

    def __init__(self, name: str, sizes: tuple[int, int, int], experts: int, slots: int, seed: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LoraExpert(sizes, seed, name, e) for e in range(experts))
        self.router = uniform_matrix(slots, sizes[1], generator(seed, "routed lora", name, "router"))

    def forward(self, hidden: Tensor, slots: Sequence[int], best: int, dropout: float = 0.0) -> Tensor:
        """Return the unscaled delta ``[..., out]`` for ``hidden [..., in]``.

        Args:
            hidden: The layer's input.
            slots: The expert of every slot in use; the first rows of the router belong to them.
            best: Slots per token.
            dropout: Share of the experts' input that is set to zero; the router's is whole.
        """
        used = sorted(set(slots))
        experts = [cast(LoraExpert, self.experts[e]) for e in used]
        stacked_A, stacked_B = torch.cat([e.A for e in experts]), torch.cat([e.B for e in experts], 1)
        low = F.linear(F.dropout(hidden, dropout), stacked_A.to(hidden.dtype))
        if len(slots) > 1:
            weights = self._weights(hidden, [used.index(e) for e in slots], best).to(low.dtype)
            low = (torch.unflatten(low, -1, (len(used), -1)) * weights.unsqueeze(-1)).flatten(-2)
        return F.linear(low, stacked_B.to(low.dtype))

    def _weights(self, hidden: Tensor, places: Sequence[int], best: int) -> Tensor:
        """Return the experts' fp32 weights ``[..., E]``; ``places`` has the expert's place for each slot."""
        logits = F.linear(hidden, self.router[: len(places)].to(hidden.dtype))
        top = logits.softmax(-1, dtype=torch.float32).topk(best, dim=-1)
        shares = top.values / top.values.sum(-1, keepdim=True)
        chosen = torch.tensor(places, device=hidden.device)[top.indices]
        return (shares.unsqueeze(-1) * F.one_hot(chosen, max(places) + 1)).sum(-2)


class RoutedLora(Part):
    """All routed layers of one client; at first every expert has one slot, and all of them are used.

    Args:
        model: The base, with or without PEFT's wrappers around its Linear layers.
        targets: Names of Linear modules.
        experts: Number of experts of each.
        slots: Number of rows of each router.
        rank: r of every expert.
        alpha: Scaling numerator: s = alpha / rank.
        dropout: Dropout on the experts' input while their module is in training mode.
        seed: The run's seed; with layer and expert number it determines every start, the same on all clients.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str],
        *,
        experts: int,
        slots: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self._experts, self._rows = experts, slots
        self._linears = {name: submodule(model, name) for name in targets}
        # The name is part of the tensor names in run directories: it cannot change.
        self.sites = nn.ModuleDict()
        for name, module in self._linears.items():
            layer = RoutedLayer(name, (rank, *linear_sizes(name, module)), experts, slots, seed)
            self.sites[key(name)] = layer.to(next(module.parameters()).device)
        self.activate(range(experts), experts)

    def activate(self, slots: Sequence[int], best: int) -> None:
        """Use these slots until the next call.

        Args:
            slots: The expert of every slot; with a single one there is nothing to route.
            best: Slots per token.
        """
        if not (set(slots) <= set(range(self._experts)) and 1 <= best <= len(slots) <= self._rows):
            raise GraftError(
                f"slots {list(slots)}, the best {best} of them",
                f"there are {self._experts} experts and {self._rows} router rows",
                "name an expert for every slot, and use at least one slot per token",
            )
        self.slots, self.best = tuple(slots), best

    def hooks(self) -> Iterator[Removable]:
        """Add every layer's mixture to its module's output."""
        for name, module in self._linears.items():
            yield module.register_forward_hook(self._hook(self.sites[key(name)]))

    def _hook(self, layer: nn.Module) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            dropout = self.dropout if module.training else 0.0
            delta: Tensor = layer(args[0].to(output.dtype), self.slots, self.best, dropout)
            return output + self.scale * delta.to(output.dtype)

        return add
