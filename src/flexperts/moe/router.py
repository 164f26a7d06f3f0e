"""Where a layer's router keeps its matrix: found by shape beside the experts, never by name of model or module.

Shapes: N experts (more rows where the router has other choices too), D' width of the router's input (not always the
experts' D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from flexperts.errors import ModelError
from flexperts.moe.layout import LayerExperts


@dataclass(frozen=True)
class Router:
    """A located router.

    Args:
        name: Qualified name of the module that holds the matrix, such as ``model.layers.4.mlp.gate``.
        module: That module.
        parameter: The matrix's name in it.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"

    @property
    def weight(self) -> Tensor:
        """The matrix ``[N, D']`` as the module uses it."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight


def find_router(model: nn.Module, experts: LayerExperts) -> Router:
    """Return a layer's router: the one matrix with a row per choice in the experts' block or two levels below.

    Args:
        model: The model that holds ``experts``.
        experts: The experts of one layer; they and whatever is named shared are not searched.
    """
    rows = experts.num_experts + experts.num_identities
    around = _around(experts.block, model.get_submodule(experts.block), experts.module, depth=2)
    found = [Router(name, module) for name, module in around if _is_matrix(module, rows)]
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{experts.block or type(model).__name__} holds {', '.join(r.name for r in found) or 'no router matrix'}",
        f"one matrix named weight must have {rows} rows, one for each expert",
        "use a method that leaves the router alone, or another base",
    )


def _around(name: str, module: nn.Module, experts: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and what lies up to ``depth`` levels below it, without the experts and the shared ones."""
    yield name, module
    for child, inner in module.named_children() if depth else ():
        if inner is not experts and "shared" not in child:
            yield from _around(f"{name}.{child}" if name else child, inner, experts, depth - 1)


def _is_matrix(module: nn.Module, rows: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == rows
