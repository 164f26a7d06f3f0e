"""Planned FLOPs against torch's own counter on live models, and against shapes by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexperts.client.model import ClientModel
from flexperts.costs.flops import added_flops, base_flops
from flexperts.costs.rounds import planned_sites
from flexperts.costs.speed import counted_flops
from flexperts.methods.registry import make_method
from flexperts.modeling.load import LoadedBase
from flexperts.recipe import parse_recipe
from flexperts.testing import tiny_model

TOKENS, HEADS, LAYERS, K = 12, 4, 2, 2


def attention(model: Any) -> int:
    """FLOPs per token of Q K' and of A V over ``TOKENS`` columns, which plans leave out."""
    config = model.config
    keys = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // HEADS
    values = getattr(config, "v_head_dim", None) or keys
    return 2 * TOKENS * HEADS * (keys + values) * LAYERS


def counted(model: Any, dense: Any) -> float:
    ids = torch.randint(0, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return counted_flops(model, ids) - attention(dense)


# Families of plain attention, whose products over columns ``attention`` knows.
@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"],
)
def test_a_base_costs_what_torch_counts(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    assert base_flops(model, K) == counted(model, model)


def test_tied_embeddings_are_counted_once_as_the_output_matrix() -> None:
    free, tied = tiny_model("olmoe"), tiny_model("olmoe", tie_word_embeddings=True)
    assert base_flops(free, K) == base_flops(tied, K)


@pytest.mark.parametrize(
    "settings",
    [
        ("method.name=fedavg",),
        ("method.name=flex",),
        ("method.name=flex", "graft.experts=2"),
        ("method.name=flex", "graft.experts=2", "graft.rank=3"),
        ("method.name=flex", "graft.sharing=both", "graft.rank=2", "graft.layers=[0]"),
        ("method.name=fedavg_experts",),
        ("method.name=moe_fedavg",),
        ("method.name=hfedmoe_style",),
        ("method.name=local",),
        ("graft.output=difference", "graft.experts=2"),
        ("graft.output=difference", "graft.rank=4"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_what_a_method_adds_is_what_torch_counts(family: str, settings: tuple[str, ...]) -> None:
    """Exact wherever all experts are adapted or none: then it does not matter which ones a token meets."""
    model = tiny_model(family, attn_implementation="eager")
    config = parse_recipe("data.silos = {}", settings)
    base = LoadedBase(model, SimpleNamespace(pad_token_id=0), "", "")
    own = base_flops(model, K)
    lent = ClientModel(base, config, make_method(config.method))
    (site,) = planned_sites(lent, ["client"], K).values()
    with lent.lend(site, {}) as (_, parts):
        assert own + added_flops(lent, parts, K) == counted(lent.lora.model, model)
    lent.close()


def test_a_graft_of_whole_experts_by_hand() -> None:
    """k experts of 3 D I values and k gate rows of D, in both layers; LoRA of rank 8 on q, k, v."""
    model = tiny_model("qwen2_moe")
    config = parse_recipe("data.silos = {}", ["graft.experts=2", "graft.output=expert"])
    lent = ClientModel(
        LoadedBase(model, SimpleNamespace(pad_token_id=0), "", ""), config, make_method(config.method)
    )
    (site,) = planned_sites(lent, ["client"], K).values()
    with lent.lend(site, {}) as (_, parts):
        lora = 8 * ((32 + 32) + (32 + 16) + (32 + 16))
        assert added_flops(lent, parts, K) == 2 * LAYERS * (2 * (3 * 32 * 16) + 2 * 32 + lora)
