"""The name of a base: equal for equal weights, another for any change it can see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexperts.parameters.fingerprint import fingerprint
from flexperts.testing import tiny_model


def small(name: str = "weight") -> nn.Module:
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.arange(20.0).reshape(4, 5)))
    module.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    return module


def test_equal_weights_have_one_name() -> None:
    assert fingerprint(small()) == fingerprint(small())
    assert fingerprint(tiny_model(seed=3)) == fingerprint(tiny_model(seed=3))
    assert fingerprint(tiny_model(seed=3)) != fingerprint(tiny_model(seed=4))
    assert len(fingerprint(small())) == 64


@pytest.mark.parametrize("place", range(20))
def test_one_changed_value_of_a_small_tensor_shows(place: int) -> None:
    changed = small()
    with torch.no_grad():
        changed.weight.view(-1)[place] += 1e-3
    assert fingerprint(changed) != fingerprint(small())


def test_name_type_and_shape_show() -> None:
    reshaped = small()
    reshaped.weight = nn.Parameter(reshaped.weight.detach().reshape(5, 4))
    others = [small("other"), small().to(torch.bfloat16), reshaped]
    assert len({fingerprint(m) for m in [small(), *others]}) == 4


def test_types_of_equal_bytes_show() -> None:
    halves = [nn.Linear(4, 4, bias=False, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    for half in halves:
        nn.init.zeros_(half.weight)
    assert fingerprint(halves[0]) != fingerprint(halves[1])


def test_large_tensors_are_sampled_to_their_end() -> None:
    """Every 4th of 4,096 values is read: a change of 4 neighbours anywhere shows."""

    def large(changed: slice) -> nn.Module:
        module = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            module.weight.zero_().view(-1)[changed] = 1
        return module

    changes = [slice(0, 0), slice(0, 4), slice(2046, 2050), slice(4092, 4096)]
    assert len({fingerprint(large(change)) for change in changes}) == 4


def test_memory_layout_does_not_show() -> None:
    turned = small()
    turned.weight = nn.Parameter(turned.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert fingerprint(turned) == fingerprint(small())
