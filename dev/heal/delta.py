"""What healing changes in a split model, and the small file that holds it.

    expert matrix                          W + B A, rank r; A and B stored in int8, each of their r rows and columns
                                           with a scale in fp32
    router, norm, shared expert's gate     W + D; D stored in bf16

During training the terms are parametrizations of torch: the model's own weights stay frozen, and the model computes
with the sum, rounded to the type of the weights. Shapes: E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexperts.checked_file import read_sealed, write_sealed
from flexperts.errors import ConfigError
from flexperts.seeding import generator

FORMAT = "flexperts.healed.1"
LIMIT = 16_000_000
"""Most bytes of partition and delta together, so that both can be shipped in a package."""
SCALE = ".scale"


class LowRank(nn.Module):
    """The term B A of a stack of matrices; it starts at zero."""

    def __init__(self, weight: Tensor, rank: int, draw: torch.Generator) -> None:
        super().__init__()
        *stack, out, into = weight.shape
        drawn = torch.randn(*stack, rank, into, generator=draw) / math.sqrt(into)
        self.A = nn.Parameter(drawn.to(weight.device))
        self.B = nn.Parameter(torch.zeros(*stack, out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight [E, out, in]`` with the term, in its own type."""
        return (weight.float() + self.B @ self.A).to(weight.dtype)


class Full(nn.Module):
    """A term of the weight's shape; it starts at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with the term, in its own type."""
        return (weight.float() + self.D).to(weight.dtype)


def attach(model: nn.Module, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Freeze a split model and add its terms; return their parameters by name.

    Args:
        model: A `Qwen2MoeForCausalLM`.
        rank: The rank of an expert's terms.
        seed: Of the matrices A.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        for own, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() == 3:
                term: nn.Module = LowRank(weight, rank, generator(seed, name, own))
            elif weight.dim() == 1 or name.endswith((".mlp.gate", ".shared_expert_gate")):
                term = Full(weight)
            else:
                continue
            parametrize.register_parametrization(module, own, term)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def merge(model: nn.Module) -> None:
    """Make the sums the model's weights, and remove the terms."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for own in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, own, leave_parametrized=True)


def packed(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the terms as they are stored."""
    stored = {}
    for name, term in terms.items():
        value = term.detach().float().cpu()
        if value.dim() < 3:
            stored[name] = value.to(torch.bfloat16)
            continue
        scale = value.abs().amax(_along(name), keepdim=True).clamp_min(1e-12) / 127
        stored[name], stored[name + SCALE] = (value / scale).round().to(torch.int8), scale
    return stored


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored terms in fp32."""
    return {
        name: value.float() * stored.get(name + SCALE, 1.0)
        for name, value in stored.items()
        if not name.endswith(SCALE)
    }


def _along(name: str) -> int:
    """Return the dimension that shares a scale: A's rows are [.., r, in], B's columns [.., out, r]."""
    return -1 if name.endswith(".A") else -2


def check_size(terms: Mapping[str, Tensor], partition: Path, rank: int) -> int:
    """Return the bytes of partition and delta; refuse more than ``LIMIT``. Values do not change the size."""
    stored = packed(terms)
    total = len(save(stored)) + partition.stat().st_size + 1000  # seal and settings
    if total <= LIMIT:
        return total
    by_rank = sum(value.nbytes for name, value in stored.items() if name.endswith((".A", ".B", SCALE))) // rank
    most = rank - math.ceil((total - LIMIT) / by_rank)
    raise ConfigError(
        f"--rank {rank}",
        f"partition and delta would take {total:,} bytes, more than {LIMIT:,}",
        f"use at most {most}" if most > 0 else "split fewer layers",
    )


def save_delta(path: Path, terms: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the terms as a file with a checksum; ``about`` holds rank, seed and what they were trained on."""
    write_sealed(path, FORMAT, packed(terms), dict(about))


def apply_delta(model: nn.Module, path: Path) -> None:
    """Add the terms in a file to a split model's weights, in place."""
    stored, about = read_sealed(path, FORMAT)
    terms, held = unpacked(stored), attach(model, about["rank"], about["seed"])
    if {name: term.shape for name, term in terms.items()} != {name: term.shape for name, term in held.items()}:
        raise ConfigError(f"{path}", "it was trained for another split", "give the partition it was trained for")
    with torch.no_grad():
        for name, term in held.items():
            term.copy_(terms[name])
    merge(model)
