"""lora.dropout reaches every low-rank pair that a method trains, in training alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DROPPED = {
    "fedalt": "{}",
    "fedamole": "{}",
    "fedavg_experts": "{}",
    "fedlease": "{}",
    "fedmoe_da": "{}",
    "fedmoe_style": "{}",
    "hfedmoe_style": "{}",
    "moe_fedavg": "{rank=2}",
    "comigs": "{}",
    "pfedmoe_style": "{}",
}


def outputs(take_turn: Any, method: str, options: str, dropout: float) -> tuple[Tensor, Tensor]:
    """Return logits in training and in evaluation, where attention LoRA adds nothing."""
    settings = (f"method.name={method}", f"method.options={options}", f"lora.dropout={dropout}")
    with take_turn(*settings) as (_, turn), torch.no_grad():
        for name, parameter in turn.site.lora.parameters().items():
            if ".lora_B." in name:
                parameter.zero_()
        torch.manual_seed(0)
        tokens, found = torch.randint(250, (2, 12)), []
        for training in (True, False):
            turn.model.train(training)
            found.append(turn.model(input_ids=tokens).logits)
        return found[0], found[1]


@pytest.mark.parametrize("method", DROPPED)
def test_low_rank_pairs_have_dropout_in_training_alone(take_turn: Any, method: str) -> None:
    whole_training, whole = outputs(take_turn, method, DROPPED[method], 0.0)
    training, evaluation = outputs(take_turn, method, DROPPED[method], 0.5)
    assert torch.equal(whole_training, whole)
    assert torch.equal(evaluation, whole)
    assert (training - whole).abs().max() > 1e-3


def test_whole_experts_have_none(take_turn: Any) -> None:
    training, evaluation = outputs(take_turn, "moe_fedavg", "{}", 0.5)
    assert torch.equal(training, evaluation)
