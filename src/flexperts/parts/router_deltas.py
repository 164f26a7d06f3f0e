"""Router training: while the part is attached, the router's matrix is W + delta, with W frozen.

Shapes: N experts, D' width of the router's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexperts.moe.layout import LayerExperts
from flexperts.moe.router import Router, find_router
from flexperts.parts.part import Part, Removable, key


class RouterDeltas(Part):
    """A trainable fp32 delta ``[N, D']`` on the router's matrix of each layer, zero at the start.

    If a router can also choose something other than experts, the rows of these choices stay frozen.

    While attached, torch lists the frozen matrix as ``<router>.parametrizations.weight.original``; the delta itself
    is never among the base's parameters. Detach the part before you save the base.

    Args:
        model: The base.
        experts: Its experts modules; each one's router gets a delta.
    """

    def __init__(self, model: nn.Module, experts: Sequence[LayerExperts]) -> None:
        super().__init__()
        self._routers = {e.name: find_router(model, e) for e in experts}
        rows = {e.name: self._routers[e.name].weight[: e.num_experts] for e in experts}
        deltas = {key(n): torch.zeros_like(w, dtype=torch.float32) for n, w in rows.items()}
        self.layers = nn.ParameterDict({n: nn.Parameter(delta) for n, delta in deltas.items()})

    def weight(self, experts_name: str) -> Tensor:
        """Return the experts' rows ``[N, D']``, in fp32, of the matrix that the router uses when attached."""
        router = self._routers[experts_name]
        frozen = router.weight
        if parametrize.is_parametrized(router.module, router.parameter):
            frozen = router.module.parametrizations[router.parameter].original  # type: ignore[index, union-attr]
        whole = self._sum(experts_name, frozen.detach()) if self.enabled else frozen.detach().float()
        return whole[: len(self.layers[key(experts_name)])]

    def hooks(self) -> Iterator[Removable]:
        """Replace every router's matrix by the sum of the frozen matrix and its delta."""
        for name, router in self._routers.items():
            yield _Parametrized(router, _Plus(self, name))

    def _sum(self, name: str, frozen: Tensor) -> Tensor:
        delta: Tensor = self.layers[key(name)]
        return frozen.float() + F.pad(delta, (0, 0, 0, len(frozen) - len(delta)))


class _Plus(nn.Module):
    """frozen -> frozen + delta in the frozen dtype; the part is in a tuple, so that torch does not register it."""

    def __init__(self, part: RouterDeltas, name: str) -> None:
        super().__init__()
        self._part, self._name = (part,), name

    def forward(self, frozen: Tensor) -> Tensor:
        part = self._part[0]
        return part._sum(self._name, frozen).to(frozen.dtype) if part.enabled else frozen


class _Parametrized:
    """One router's parametrization; removing it restores the parameter object, order and names."""

    def __init__(self, router: Router, plus: _Plus) -> None:
        self.router = router
        self.order = [name for name, _ in router.module.named_parameters(recurse=False)]
        parametrize.register_parametrization(router.module, router.parameter, plus)

    def remove(self) -> None:
        """Restore the frozen parameter."""
        module = self.router.module
        parametrize.remove_parametrizations(module, self.router.parameter, leave_parametrized=False)
        # torch puts it behind the module's other parameters; restore the order in the state_dict.
        for name in self.order[self.order.index(self.router.parameter) + 1 :]:
            later = module.get_parameter(name)
            delattr(module, name)
            module.register_parameter(name, later)
