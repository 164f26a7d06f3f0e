"""What each model adds to the base: taken from the run as evaluation sets it up, held once, copied nowhere."""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from flexperts.finished.trained import TrainedRun
from flexperts.methods.kit.method import State
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts
from flexperts.parts.personal_expert import FullExpert
from flexperts.serving.contract import ModelName, find_model
from flexperts.serving.engine.additions import Additions, additions, all_models
from flexperts.serving.engine.lanes import Lanes, MixedLane, OwnLane
from flexperts.serving.engine.mixed_grafts import MixedGrafts
from flexperts.testing import tiny_model

from .disturbed_run import Recipe, disturbed_run


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A FLEx run in bf16, as real ones are."""
    out = tmp_path_factory.mktemp("runs") / "flex"
    return disturbed_run(recipe, out, "model.dtype=bfloat16", "model.precision=bf16")


def test_the_page_knows_every_state() -> None:
    script, style = (files("flexperts.serving") / "page" / f"page.{end}" for end in ("js", "css"))
    for state in get_args(State):
        assert f"  {state}: {{ title: " in script.read_text(encoding="utf-8")
        assert f'[data-state="{state}"] {{ --stage: var(--{state}); }}' in style.read_text(encoding="utf-8")


def test_states_add_what_the_method_says(trained: TrainedRun) -> None:
    untouched, common, own = (_added(trained, ModelName("clinic", s)) for s in trained.model.method.states)
    assert untouched == Additions()
    assert sorted(common.lora) == sorted(trained.model.lora.targets)
    assert not common.grafts
    assert own.lora_key == common.lora_key is not None
    assert sorted(own.grafts) == [experts.name for experts in trained.model.experts]
    assert trained.model.lent is None


def test_what_is_common_has_one_key_and_what_is_personal_one_per_client(trained: TrainedRun) -> None:
    own = [_added(trained, ModelName(client, "personalized")) for client in trained.clients]
    assert len({added.lora_key for added in own}) == 1
    assert len({added.graft_key for added in own}) == len(own)
    lanes = Lanes(trained)
    assert isinstance(lanes[all_models(trained)[0]], MixedLane)
    assert len(set(map(id, lanes.values()))) == 1


def test_a_shared_graft_is_held_once(recipe: Recipe, tmp_path: Path) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", "graft.sharing=shared")
    found = [_added(trained, ModelName(client, "global")) for client in trained.clients]
    assert len({added.graft_key for added in found}) == 1
    assert found[0].graft_key is not None


def test_whole_experts_are_held_in_the_bases_type(trained: TrainedRun) -> None:
    for layer in _added(trained, ModelName("shop", "personalized")).grafts.values():
        experts = [expert for graft in layer for expert in graft.personal]
        assert all(isinstance(expert, FullExpert) for expert in experts)
        assert {p.dtype for expert in experts for p in expert.parameters()} == {torch.bfloat16}


def test_low_rank_experts_read_the_base_where_it_lies(recipe: Recipe, tmp_path: Path) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", "graft.rank=4")
    own = _added(trained, ModelName("clinic", "personalized"))
    mixed = MixedGrafts({"clinic": own.grafts})
    mixed.select(["clinic", None])
    stored = {p.untyped_storage().data_ptr() for p in trained.model.base.model.parameters()}
    for layer in mixed._layers:
        assert layer._selected
        assert {w.up.untyped_storage().data_ptr() for w, _ in layer._selected.runs} <= stored
        assert layer._selected.rows.tolist() == [0]


@pytest.mark.parametrize("rank", ["full", 4])
def test_grafts_of_differences_and_of_outputs_share_a_batch(rank: Any) -> None:
    """A floor's local model has whole outputs where the method has differences; every row is as on its own."""
    experts = find_experts(tiny_model("qwen2_moe"))
    stream = torch.Generator().manual_seed(0)
    kinds = {"whole": (False, (1, 2)), "difference": (True, (2, 1)), "whole too": (False, (2, 3))}
    grafts = {
        name: Grafts(experts, {e.name: indices for e in experts}, rank=rank, difference=difference)
        for name, (difference, indices) in kinds.items()
    }
    with torch.no_grad():
        for parameter in (p for own in grafts.values() for p in own.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))
    mixed = MixedGrafts({name: {g.experts.name: [g] for g in own} for name, own in grafts.items()})
    hidden = torch.randn(4, 8, experts[0].width, generator=stream)
    for order in itertools.permutations([*kinds, None]):
        mixed.select(order)
        for number, layer in enumerate(mixed._layers):
            with torch.no_grad():
                term = layer.term(hidden)
                assert term is not None
                for row, name, found in zip(hidden, order, term, strict=True):
                    alone = [*grafts[name]][number](row) if name else torch.zeros_like(row)
                    torch.testing.assert_close(found, alone)


def test_models_that_differ_only_in_what_is_subtracted_have_different_keys(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", "graft.output=difference")
    name = ModelName("clinic", "personalized")
    difference = _added(trained, name)
    whole = trained.config.graft.model_copy(update={"output": "expert"})
    monkeypatch.setattr(trained.model, "config", trained.config.model_copy(update={"graft": whole}))
    assert _added(trained, name).graft_key != difference.graft_key


def test_other_parts_have_a_lane_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", "graft.place=in_place")
    lanes = Lanes(trained)
    assert isinstance(lanes[ModelName("clinic", "personalized")], OwnLane)
    assert isinstance(lanes[ModelName("clinic", "global")], MixedLane)


def test_names_are_read_as_they_are_written() -> None:
    models = [ModelName("clinic", "zero_shot"), ModelName("clinic", "global"), ModelName("clinic", "personalized")]
    assert [str(model) for model in models] == ["clinic@zero_shot", "clinic@global", "clinic"]
    assert [find_model(str(model), models) for model in models] == models
    assert find_model("clinic@personalized", models) == models[2]
    assert find_model("clinic", models[:2]) == models[1]
    other = [ModelName("Zürich", "global")]
    assert find_model("Zu\u0308rich@global", other) == find_model("Zürich", other) == other[0]


def _added(trained: TrainedRun, name: ModelName) -> Additions:
    found = additions(trained, name)
    assert found is not None
    return found
