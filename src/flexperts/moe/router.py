"""Search for a layer's router matrix: by shape near the experts, never by name of model or module.

Shapes: N experts (more rows if the router has other choices too), D' width of the router's input (not always the
experts' D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flexperts.errors import ModelError
from flexperts.moe.layout import LayerExperts


@dataclass(frozen=True)
class Router:
    """A located router.

    Args:
        name: Qualified name of the module with the matrix, such as ``model.layers.4.mlp.gate``.
        module: The module with this name.
        parameter: The matrix's name in the module.
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
    """Return a layer's router: the only matrix with a row per choice in the experts' block or two levels below it.

    Args:
        model: The model that contains ``experts``.
        experts: The experts of one layer; they and modules named "shared" are not searched.
    """
    rows = experts.num_experts + experts.num_identities
    around = _around(experts.block, model.get_submodule(experts.block), experts.module, depth=2)
    found = [Router(name, module) for name, module in around if _is_matrix(module, rows)]
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{experts.block or type(model).__name__} has {', '.join(r.name for r in found) or 'no router matrix'}",
        f"exactly one matrix named weight must have {rows} rows, one per expert",
        "use a method that does not train the router, or another base",
    )


def expert_rows(model: nn.Module, experts: LayerExperts, indices: Sequence[int]) -> Tensor:
    """Return the router's rows of some experts, as an fp32 copy ``[k, D]``: a gate's weight on the experts' input.

    The matrix alone: a few routers also have a bias, or normalise their input first.

    Args:
        model: The model that contains ``experts``.
        experts: The experts of one layer.
        indices: k numbers of experts.

    Raises:
        ModelError: The router cannot be found, or its input has another width than the experts'.
    """
    remedy = "set graft.gate_start = 'constant', or use another base"
    try:
        router = find_router(model, experts)
    except ModelError as error:
        raise ModelError(error.value, error.rule, remedy) from error
    if router.weight.shape[1] != experts.width:
        raise ModelError(
            f"{router.name} reads {router.weight.shape[1]} values, {experts.name} {experts.width}",
            "a gate can start as the router's row only if both read the same input",
            remedy,
        )
    return router.weight.detach()[list(indices)].float()


def _around(name: str, module: nn.Module, experts: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those up to ``depth`` levels below it, without the experts and shared modules."""
    yield name, module
    for child, inner in module.named_children() if depth else ():
        if inner is not experts and "shared" not in child:
            yield from _around(f"{name}.{child}" if name else child, inner, experts, depth - 1)


def _is_matrix(module: nn.Module, rows: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == rows
