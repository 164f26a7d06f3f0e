"""What cannot be grafted is refused by name, never skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexperts.errors import ConfigError, GraftError, ModelError
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts
from flexperts.testing import tiny_model

_TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}


def llama() -> PreTrainedModel:
    config = LlamaConfig(**_TINY, num_attention_heads=2, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def test_a_dense_model_cannot_be_grafted() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no experts"):
        find_experts(llama())


def test_a_foreign_experts_module_beside_good_ones_is_refused() -> None:
    model = tiny_model()

    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2))

    model.model.layers[0].odd = OddExperts()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.odd \(OddExperts\)"):
        find_experts(model)


@pytest.mark.parametrize("indices", [(), (4,), (-1,), (1, 1)])
def test_wrong_experts_are_refused(indices: tuple[int, ...]) -> None:
    experts = find_experts(tiny_model())
    with pytest.raises(GraftError, match="different numbers from 0 to 3"):
        Grafts(experts, {experts[0].name: indices})


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(GraftError, match="nowhere"):
        Grafts(find_experts(tiny_model()), {"nowhere": (0,)})


def test_attaching_twice_is_refused() -> None:
    experts = find_experts(tiny_model())
    grafts = Grafts(experts, {e.name: (0,) for e in experts}).attach()
    with pytest.raises(GraftError, match="attached already"):
        grafts.attach()


def test_layers_can_be_left_without_a_graft() -> None:
    experts = find_experts(tiny_model())
    assert list(Grafts(experts, {experts[1].name: (0,)}).choice) == [experts[1].name]


def test_unknown_projections_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"q_projj.*choose from \['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"):
        attention_linears(tiny_model(), ("q_projj",))
