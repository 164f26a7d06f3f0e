"""Kept moments: AdamW on the personal group by hand over two rounds, and its state between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexperts.config.run import TrainingConfig
from flexperts.data.prompts import Example
from flexperts.parameters.split import ParameterSplit, split_parameters
from flexperts.testing import tiny_model
from flexperts.training.local import LocalSettings, train_local

Step = dict[int, tuple[float, Tensor]]
"""Parameter's id -> learning rate, gradient."""
TRAINING = TrainingConfig(lr=0.01, personal_lr=0.002, max_grad_norm=1e9)
SETTINGS = LocalSettings(training=TRAINING, precision="fp32", pad_token_id=258, steps=3, total_steps=100)
EXAMPLES = [Example((10, 11, 12, 13, 14, 257), 3), Example((20, 21, 257), 1), Example((30, 31, 32, 257), 2)]


@pytest.fixture
def split() -> tuple[Any, ParameterSplit]:
    """A model with its query projections as the shared part, its value projections as the personal one."""
    model = tiny_model(seed=1)
    names = dict(model.named_parameters())
    shared, personal = ([n for n in names if word in n] for word in ("q_proj.weight", "v_proj.weight"))
    for name in shared + personal:
        names[name].requires_grad_(True)
    return model, split_parameters(names, shared, personal)


@pytest.fixture
def steps() -> Iterator[list[Step]]:
    seen: list[Step] = []

    def record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        seen.append({id(p): (g["lr"], p.grad.double()) for g in groups for p in g["params"]})

    handle = register_optimizer_step_pre_hook(record)
    yield seen
    handle.remove()


def adam(weight: Tensor, rounds: list[list[tuple[float, Tensor]]]) -> Tensor:
    """Return a weight after AdamW's steps in float64; every round starts with moments of zero."""
    weight = weight.double().clone()
    for each in rounds:
        m = v = torch.zeros_like(weight)
        for t, (lr, gradient) in enumerate(each, 1):
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            weight = weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize("kept", [False, True])
def test_two_rounds_by_hand(split: tuple[Any, ParameterSplit], steps: list[Step], kept: bool) -> None:
    """Kept: the personal group takes six steps of one AdamW. The shared group has a new one in every round."""
    model, groups = split
    before = {n: p.detach().clone() for n, p in groups.trained.items()}
    moments: dict[str, Tensor] | None = {} if kept else None
    for number in (0, 1):
        stream = torch.Generator().manual_seed(number)
        train_local(model, groups, EXAMPLES, SETTINGS, stream, moments=moments)
    for name, parameter in groups.trained.items():
        seen = [step[id(parameter)] for step in steps]
        whole = kept and name in groups.personal
        expected = adam(before[name], [seen] if whole else [seen[:3], seen[3:]])
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)
        other = adam(before[name], [seen[:3], seen[3:]] if whole else [seen])
        assert (parameter.detach() - other).abs().max() > 1e-4


def test_moments_are_those_of_the_personal_group_alone(split: tuple[Any, ParameterSplit]) -> None:
    model, groups = split
    moments: dict[str, Tensor] = {}
    train_local(model, groups, EXAMPLES, SETTINGS, torch.Generator(), moments=moments)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert moments.keys() == {f"{kind}.{name}" for kind in kinds for name in groups.personal}
    for name, parameter in groups.personal.items():
        assert moments[f"step.{name}"] == 3
        assert moments[f"exp_avg.{name}"].shape == parameter.shape


def test_stored_moments_are_not_changed_in_place(split: tuple[Any, ParameterSplit]) -> None:
    """They may be views of a mapped file."""
    model, groups = split
    moments: dict[str, Tensor] = {}
    train_local(model, groups, EXAMPLES, SETTINGS, torch.Generator(), moments=moments)
    stored = dict(moments)
    copies = {name: tensor.clone() for name, tensor in stored.items()}
    train_local(model, groups, EXAMPLES, SETTINGS, torch.Generator(), moments=moments)
    assert all(torch.equal(stored[name], copies[name]) for name in copies)
    assert not any(torch.equal(moments[name], copies[name]) for name in copies)


def test_a_parameter_that_had_no_gradient_has_no_moments(split: tuple[Any, ParameterSplit]) -> None:
    model, groups = split
    name, parameter = next(iter(groups.personal.items()))
    parameter.requires_grad_(False)
    moments: dict[str, Tensor] = {}
    train_local(model, groups, EXAMPLES, SETTINGS, torch.Generator(), moments=moments)
    assert {key.partition(".")[2] for key in moments} == groups.personal.keys() - {name}
