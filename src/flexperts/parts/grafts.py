"""Grafting: personal experts with a sigmoid gate, added to the untouched routed output by a forward hook.

    y = sum_{j in TopK} g_j(x) E_j(x)  +  sum_p c_p sigmoid(G_p(x)) E_p(x)

c_p is a constant: 1, or what the caller sets. A graft of differences adds E_p(x) - E_s(x) instead of E_p(x); E_s is
the frozen expert that E_p started from. Shapes: T tokens, D expert width, k personal experts.
Source: FLEx (arXiv 2506.00965).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.errors import GraftError
from flexperts.moe.layout import LayerExperts
from flexperts.parts.part import Part, Removable, key
from flexperts.parts.personal_expert import FullExpert, Rank, personal_expert

_DISTURBANCE = 1e-3
"""Standard deviation of the noise of ``disturb``; for an expert's tensor, relative to the tensor's own."""
Choice = Mapping[str, Sequence[int]]
"""Experts module name -> indices of the pretrained experts from which the personal experts start."""
Scales = Mapping[str, Sequence[float]]
"""Experts module name -> the constant factor of each of its personal experts."""
GATES = "*.graft_gate_*"
"""Pattern of the names of all gates' parameters in a split."""


class Graft(nn.Module):
    """The k personal experts and the gate of one MoE layer.

    Args:
        experts: The layer's experts module.
        indices: The k pretrained experts to start from, all different.
        rank: LoRA rank of the personal experts, or ``"full"`` for trainable copies.
        alpha: LoRA scaling numerator; not used by ``"full"``.
        gate_bias: Initial bias of the gate; with a weight of zero, a bias of 0 starts it at sigmoid(0) = 0.5.
        generator: Stream for LoRA's A.
        scales: k constant factors on the personal experts' outputs; None means 1 for each.
        silent: Start the personal experts with outputs of zero; for ``"full"`` only, and not for differences.
        difference: Add E_p(x) - E_s(x), the personal expert's output minus that of the frozen expert it started
            from, so that the untrained graft changes nothing.
        gate_weight: Initial weight of the gate ``[k, D]``; None means zero.
    """

    def __init__(
        self,
        experts: LayerExperts,
        indices: Sequence[int],
        rank: Rank,
        alpha: float,
        gate_bias: float,
        generator: Generator,
        scales: Sequence[float] | None = None,
        silent: bool = False,
        difference: bool = False,
        gate_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_indices(experts, indices)
        if silent and difference:
            raise GraftError(
                "a silent start of a graft of differences",
                "its difference to the pretrained expert would not be zero",
                "leave one out: a graft of differences changes nothing at its start",
            )
        self.experts, self.indices, self.difference = experts, tuple(indices), difference
        self.scales = _checked_scales(experts, indices, scales)
        start = torch.zeros(len(indices), experts.width) if gate_weight is None else gate_weight
        self.graft_gate_weight = nn.Parameter(start.detach().clone())
        self.graft_gate_bias = nn.Parameter(torch.full((len(indices),), float(gate_bias)))
        self.personal = nn.ModuleList(personal_expert(experts, i, rank, alpha, generator) for i in indices)
        for expert in self.personal if silent else ():
            _full(expert).silence()
        self.to(experts.device)

    @torch.no_grad()
    def disturb(self, generator: Generator) -> None:
        """Add a little noise: two grafts in one layer with equal starts would stay equal for ever."""
        copies = [p for expert in self.personal if isinstance(expert, FullExpert) for p in expert.parameters()]
        for start in (self.graft_gate_weight, *copies):
            size = _DISTURBANCE * max(1.0 if start is self.graft_gate_weight else start.std().item(), 1e-6)
            noise = torch.randn(start.shape, generator=generator)
            start.add_((size * noise).to(start.device))

    def opening(self, hidden: Tensor) -> Tensor:
        """Return the gate's values ``[T, k]`` in (0, 1) for ``hidden [T, D]``."""
        weight, bias = self.graft_gate_weight.to(hidden.dtype), self.graft_gate_bias.to(hidden.dtype)
        return torch.sigmoid(F.linear(hidden, weight, bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the graft's addition to the layer's routed output, ``[T, D]``."""
        gates = self.opening(hidden).unsqueeze(-1).unbind(-2)
        # A factor of 1 is skipped: no work, and every bit equals a graft without factors.
        factors = [g if c == 1 else g * c for g, c in zip(gates, self.scales, strict=True)]
        terms = [factor * output for factor, output in zip(factors, self._outputs(hidden), strict=True)]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def _outputs(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield every personal expert's output, or its difference to the frozen expert's; each is ``[T, D]``."""
        for index, expert in zip(self.indices, self.personal, strict=True):
            output = expert(hidden)
            yield output - self.experts.run(hidden, self.experts.expert(index)) if self.difference else output


class Grafts(Part):
    """All grafts of one client, attachable to and detachable from the resident base.

    Args:
        experts: The base's experts modules, from ``find_experts``.
        choice: Experts to graft by experts module; modules that are not named get no graft.
        rank, alpha, gate_bias, generator: See ``Graft``.
        scales: Constant factors of the personal experts' outputs; modules that are not named have 1.
        silent, difference: See ``Graft``.
        gate_weights: The gates' initial weights ``[k, D]``; modules that are not named have zero.

    Raises:
        GraftError: ``choice`` names a module or an expert that the base does not have, ``scales`` does not fit
            ``choice``, or ``silent`` does not fit the other settings.
    """

    def __init__(
        self,
        experts: Sequence[LayerExperts],
        choice: Choice,
        *,
        rank: Rank = "full",
        alpha: float = 16.0,
        gate_bias: float = 0.0,
        generator: Generator | None = None,
        scales: Scales | None = None,
        silent: bool = False,
        difference: bool = False,
        gate_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.difference = difference
        generator = generator or torch.Generator().manual_seed(0)
        by_name = {e.name: e for e in experts}
        if unknown := sorted(choice.keys() - by_name.keys()):
            raise GraftError(f"choice names {unknown}", f"experts modules are {sorted(by_name)}", "select again")
        scales, gate_weights = scales or {}, gate_weights or {}
        if stray := sorted(scales.keys() - choice.keys()):
            raise GraftError(
                f"scales name {stray}", f"the grafted modules are {sorted(choice)}", "scale only these"
            )
        # A module name cannot hold dots.
        self.layers = nn.ModuleDict(
            {
                key(name): Graft(
                    by_name[name],
                    choice[name],
                    rank,
                    alpha,
                    gate_bias,
                    generator,
                    scales.get(name),
                    silent,
                    difference,
                    gate_weights.get(name),
                )
                for name in by_name
                if name in choice
            }
        )

    @property
    def choice(self) -> dict[str, tuple[int, ...]]:
        """The experts that were grafted, by experts module."""
        return {graft.experts.name: graft.indices for graft in self}

    @property
    def scales(self) -> dict[str, tuple[float, ...]]:
        """The constant factors of the personal experts, by experts module."""
        return {graft.experts.name: graft.scales for graft in self}

    def __iter__(self) -> Iterator[Graft]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    def hooks(self) -> Iterator[Removable]:
        """Attach every graft to its layer's experts."""
        for graft in self:
            yield self.beside(graft.experts, graft)


def _full(expert: nn.Module) -> FullExpert:
    """Return a personal expert that is a full copy; refuse a low-rank one."""
    if isinstance(expert, FullExpert):
        return expert
    raise GraftError(
        "a low-rank personal expert", "it cannot start silent", "use rank 'full', or let it start as a copy"
    )


def _check_indices(experts: LayerExperts, indices: Sequence[int]) -> None:
    good = set(range(experts.num_experts))
    if not indices or len(set(indices)) != len(indices) or not set(indices) <= good:
        raise GraftError(
            f"{experts.name}: grafts of the experts {list(indices)}",
            f"they must be different numbers from 0 to {experts.num_experts - 1}",
            "select again on this base",
        )


def _checked_scales(
    experts: LayerExperts, indices: Sequence[int], scales: Sequence[float] | None
) -> tuple[float, ...]:
    if scales is None:
        return (1.0,) * len(indices)
    if len(scales) != len(indices) or not all(map(math.isfinite, scales)):
        raise GraftError(
            f"{experts.name}: scales {list(scales)} of its personal experts",
            f"it needs one finite number for each personal expert, {len(indices)} in all",
            "select again on this base",
        )
    return tuple(float(scale) for scale in scales)


class OpeningRecorder:
    """Recorder of every layer's gate, for ``modeling.recording.record``.

    Args:
        grafts: The grafts, attached; nothing is recorded while they are disabled.
    """

    def __init__(self, grafts: Grafts) -> None:
        self.grafts = grafts
        self._seen: dict[str, list[Tensor]] = {}

    def hooks(self, mask: Tensor) -> Iterator[RemovableHandle]:
        """Watch every graft for one pass; ``mask [B * S]`` is true on tokens."""
        for graft in self.grafts:
            yield graft.register_forward_pre_hook(self._hook(mask))

    def result(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return (mean, standard deviation over tokens) of each personal expert's opening, by experts module."""
        seen = {name: torch.cat(openings).double() for name, openings in self._seen.items()}
        return {n: (t.mean(0).tolist(), t.std(0, correction=0).tolist()) for n, t in seen.items()}

    def _hook(self, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def opened(graft: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(graft, Graft)
            opening = graft.opening(args[0]).flatten(0, -2)[mask]
            self._seen.setdefault(graft.experts.name, []).append(opening.cpu())

        return opened
