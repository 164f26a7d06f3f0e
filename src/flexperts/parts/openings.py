"""Recording of gate openings: the values of grafts' gates on tokens.

Shapes: T tokens, D expert width, k personal experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexperts.parts.grafts import Graft, Grafts


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
