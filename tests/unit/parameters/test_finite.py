"""Which weight is no number, of every kind of tensor that a base has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flexperts.parameters.finite import first_not_finite
from flexperts.testing import tiny_model


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_looked_at(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    assert first_not_finite(model) is None
    tied = model.all_tied_weights_keys or {}
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        for value in (math.nan, math.inf, -math.inf):
            kept = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] = value
            found = first_not_finite(model)
            assert found is not None
            assert found.startswith(name)
            if parameter.dim() > 2:
                assert found == f"{name}[{len(parameter) - 1}]"
            parameter.view(-1)[-1] = kept
    assert first_not_finite(model) is None


def test_buffers_may_be_infinite_but_must_be_numbers() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("count", torch.tensor([1, 2]))
    model.register_buffer("empty", torch.zeros(0))
    assert first_not_finite(model) is None
    model.get_buffer("mask")[0] = math.nan
    assert first_not_finite(model) == "mask"
