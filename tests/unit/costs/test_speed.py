"""Measuring: every variant is timed, and the base is left as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flexperts.costs.speed import REFERENCE, UNTOUCHED, VARIANTS, Workload, measure
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.memory import peak_bytes, reset_peak
from flexperts.testing import tiny_model

WORK = Workload(rows=2, prompt=6, response=3, new_tokens=2, steps=1, repeats=2)


def test_all_variants_are_measured_and_leave_nothing_behind() -> None:
    model = tiny_model("qwen2_moe")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    lines: list[str] = []
    speeds = {
        s.name: s
        for s in measure(
            LoadedBase(model, SimpleNamespace(pad_token_id=0), "", ""),
            WORK,
            settings=("graft.output=expert",),
            report=lines.append,
        )
    }
    assert list(speeds) == list(VARIANTS)
    assert len(lines) == 3 * len(VARIANTS)
    assert [s.name for s in speeds.values() if s.step is None] == [UNTOUCHED]
    assert all(s.prefill > 0 and s.decode >= 0 and s.peak_memory != 0 for s in speeds.values())
    assert all(s.step > 0 for s in speeds.values() if s.step is not None)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._experts_implementation == tiny_model("qwen2_moe").config._experts_implementation

    one, two, lora = (speeds[n] for n in ("flex, k = 1", "flex, k = 2", REFERENCE))
    graft = 2 * (3 * 32 * 16 + 32 + 1)
    assert (one.trained - lora.trained, two.trained - lora.trained) == (graft, 2 * graft)
    extra = one.flops_per_token - lora.flops_per_token
    assert extra == 2 * 2 * (3 * 32 * 16 + 32)
    assert two.flops_per_token - lora.flops_per_token == 2 * extra


def test_other_settings_reach_the_variants() -> None:
    base = LoadedBase(tiny_model("olmoe"), SimpleNamespace(pad_token_id=0), "", "")
    variants = {"small": ("lora.rank=2",), "large": ("lora.rank=4",)}
    small, large = measure(base, WORK, variants, ["method.name=fedavg"])
    assert large.trained == 2 * small.trained


def test_the_peak_is_that_of_what_ran_since_the_reset() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    start = peak_bytes(device)
    if start is None:
        pytest.skip("this system does not tell")
    block = torch.ones(16_000_000)  # 64 MB
    held = peak_bytes(device)
    del block
    assert held is not None
    assert held - start > 50_000_000
    reset_peak(device)
    assert (peak_bytes(device) or 0) < held - 30_000_000
