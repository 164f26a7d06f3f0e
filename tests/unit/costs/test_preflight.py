"""What a run needs before it is loaded: sums by hand, what each knob saves, and a refusal that lists them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.costs import preflight
from flexperts.costs.activations import Activations, Lengths, row_lengths
from flexperts.costs.preflight import PROCESS, Estimator, check_fits, with_workers_that_fit
from flexperts.errors import ModelError
from flexperts.moe.experts import find_experts
from flexperts.moe.quantized import quantized_bytes
from flexperts.recipe import parse_recipe
from flexperts.testing import tiny_model

OLMOE = "olmoe-1b-7b"
PARAMETERS, EXPERTS, GRAFTS = 6_919_161_856, 16 * 64 * 3 * 2048 * 1024, 16 * (3 * 2048 * 1024 + 2049)


def recipe(*settings: str) -> RunConfig:
    fixed = f"model.base={OLMOE!r}", "model.device=cpu", "graft.output=expert", "training.personal_moments=fresh"
    return parse_recipe("data.silos = {}", [*fixed, *settings])


@pytest.fixture
def estimator(monkeypatch: pytest.MonkeyPatch) -> Estimator:
    monkeypatch.setattr(preflight, "resolve_base", lambda name: name)  # a config that ships is no base that ships
    return Estimator(OLMOE, ["a", "b"], Lengths(256, 64))


def test_what_training_holds_by_hand(estimator: Estimator) -> None:
    made = estimator.estimate(recipe())
    parts = next(need for need in made.needs if need.phase == "training").parts
    shared = 16 * 3 * 8 * (2048 + 2048)
    assert made.base == parts["base"] == 2 * PARAMETERS
    assert parts["process"] == PROCESS
    assert parts["adapters, personal experts"] == parts["gradients"] == 4 * (GRAFTS + shared)
    assert parts["optimizer"] == 8 * (GRAFTS + shared)
    assert parts["stored state"] == 4 * GRAFTS
    assert made.server == PROCESS + 12 * shared
    assert made.peak.total == max(need.total for need in made.needs)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_bytes_are_counted(estimator: Estimator, scheme: str) -> None:
    made = estimator.estimate(recipe(f"model.quantization={scheme}"))
    expected = 2 * (PARAMETERS - EXPERTS) + quantized_bytes((EXPERTS,), scheme)  # type: ignore[arg-type]
    assert made.needs[0].parts["base"] == expected


def test_experts_elsewhere_are_not_on_the_device(estimator: Estimator) -> None:
    made = estimator.estimate(recipe('model.device_map={"model.layers.3" = "disk"}'))
    assert made.needs[0].parts["base"] == 2 * (PARAMETERS - EXPERTS // 16)


def test_a_card_holds_the_offloaded_layer_that_computes(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "computing_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 10**12)
    offloaded, checkpointing = 'model.device_map={"model.layers" = "cpu"}', "training.gradient_checkpointing=true"
    at_once = estimator.estimate(recipe(offloaded, checkpointing)).needs[0].parts["base"]
    assert at_once == 2 * (PARAMETERS - EXPERTS + EXPERTS // 16)
    assert estimator.estimate(recipe(offloaded)).needs[0].parts["base"] == 2 * PARAMETERS  # autograd keeps them all


def test_every_knob_is_listed_with_what_it_saves(estimator: Estimator) -> None:
    small = "evaluation.batch_size=4"  # so that training needs most
    config = recipe(small)
    savings = estimator.savings(config)
    assert {"model.quantization=nf4", "training.gradient_checkpointing=true", "graft.rank=32"} <= savings.keys()
    before = estimator.estimate(config).peak.total
    for setting, saved in savings.items():
        assert estimator.estimate(recipe(small, setting)).peak.total == before - saved
    assert list(savings.values()) == sorted(savings.values(), reverse=True)


def test_what_does_not_fit_is_refused_with_the_knobs(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 10_000_000_000)
    made = estimator.estimate(recipe())
    with pytest.raises(ModelError) as caught:
        check_fits(made, estimator.savings(recipe()))
    said = str(caught.value)
    assert "10.0 GB are free" in said
    assert "model.quantization=nf4 saves" in said
    assert "model.preflight = false" in said
    check_fits(estimator.estimate(recipe("model.quantization=nf4", "graft.rank=32")), {})


def test_logits_and_activations_grow_with_what_they_are_of() -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16)

    def of(rows: int = 2, *settings: str, response: int = 32) -> Activations:
        config = parse_recipe("data.silos = {}", [f"training.batch_size={rows}", *settings])
        return Activations(model, config, Lengths(128, response), top_k=2)

    assert of(4).training(0) == 2 * of(2).training(0)
    assert of(2, "training.micro_batch_size=1").training(0) == of(1).training(0)
    assert of(2, "model.precision=fp32").training(0) == 2 * of(2).training(0)
    assert of(2, "training.gradient_checkpointing=true").training(0) < of(2).training(0)
    assert of(2, response=63).logits(0, trained=True) == 64 / 33 * of(2).logits(0, trained=True)
    assert of().training(4_000) > of().training(0)


def test_the_longest_row_is_measured(byte_base: Path, tmp_path: Path) -> None:
    for split, word in (("train", "a"), ("test", "bb")):
        rows = [f'{{"instruction": "{word}{n}", "response": "{"x" * (n + 1)}"}}' for n in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    files = f'{{train = "{tmp_path}/train.jsonl", test = "{tmp_path}/test.jsonl"}}'
    config = parse_recipe(f'model.base = "{byte_base}"\ndata.clients.one = {files}')
    lengths = row_lengths(workspace := Workspace(config), workspace.clients)
    assert lengths.response == 5  # four letters and the end
    assert lengths.row == len("<|user|>bb3\n<|assistant|>") + 5


def test_workers_share_the_base_and_each_needs_the_rest(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    made = estimator.estimate(recipe())
    turn = made.peak.total - made.base
    made = replace(made, free=made.base + 3 * turn + turn // 2, clients=20)
    assert made.workers == 3
    auto = recipe("engine.workers=auto")
    assert with_workers_that_fit(auto, made).engine.workers == 3
    assert with_workers_that_fit(auto, replace(made, clients=2)).engine.workers == 2
    assert with_workers_that_fit(auto, replace(made, free=10**15)) == auto
    assert with_workers_that_fit(auto, replace(made, device="cuda:0")) == auto
    for few in (1, 3):
        assert with_workers_that_fit(recipe(f"engine.workers={few}"), made).engine.workers == few
    with pytest.raises(ModelError, match=r"engine.workers = 4: each needs .* lower it to 3"):
        with_workers_that_fit(recipe("engine.workers=4"), made)


def test_a_card_never_has_the_scored_logits_of_more_than_a_few_positions() -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    passing = Activations(model, parse_recipe("data.silos = {}"), Lengths(10**6, 10**6), top_k=2)
    vocabulary = model.config.vocab_size
    assert passing.logits(32, trained=False) == 12 * 32 * (10**6 + 1) * vocabulary
    assert passing.logits(32, trained=False, on_cpu=False) == 2**29 + 12 * 32 * vocabulary
    short = replace(passing, lengths=Lengths(8, 4))
    assert short.logits(32, trained=False, on_cpu=False) == short.logits(32, trained=False)


def test_a_card_scores_several_experts_at_once() -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    passing = Activations(model, parse_recipe("data.silos = {}"), Lengths(64, 32), top_k=2)
    experts = find_experts(model)[0]
    inner = experts.expert(0).down.numel() // experts.width
    more = passing.selection(on_cpu=False) - passing.selection()
    assert more == 12 * 4 * 64 * (experts.num_experts - 1) * (experts.width + 2 * inner)
    pairs = replace(passing, config=parse_recipe("data.silos = {}", ["graft.experts=2"]))
    assert pairs.selection(on_cpu=False) == pairs.selection()
