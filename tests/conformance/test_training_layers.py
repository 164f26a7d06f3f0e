"""Layers that are computed in fewer operations while a CPU trains in bf16 give the same outputs in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.conftest import MATRIX
from torch import Tensor, nn

from flexperts.config.model import LoraConfig
from flexperts.modeling.lora import LoraAdapters
from flexperts.testing import FAMILIES, tiny_model

OTHERS = [pytest.mark.families]


@pytest.mark.parametrize(
    "name", [pytest.param(f, marks=[] if f in MATRIX["first"] else OTHERS) for f in sorted(FAMILIES)]
)
def test_layers_compute_their_own_outputs(name: str, ids: Tensor) -> None:
    """Each layer is computed again, as its class does it, from the input that it had."""
    model = tiny_model(name, dtype=torch.bfloat16)
    lora = LoraAdapters(model, LoraConfig(rank=2, alpha=6, projections=()), seed=0)
    for parameter in lora.parameters().values():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
        for layer in map(lora.module, lora.targets)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = lora.model(input_ids=ids, labels=ids).loss
        loss.backward()
        for handle in handles:
            handle.remove()
        for layer, given, output in seen:
            expected: Any = type(layer).forward(layer, given).detach()
            assert output.dtype == expected.dtype
            torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    assert len(seen) >= len(lora.targets)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters().values())
