"""What a layer, a step, a token or a scored batch costs in kernels, waits and copies, against ``budgets.toml``.

Each figure is the difference of two runs that differ in one of these, so that nothing else is in it.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from card import Counts
from test_training import loaded

from flexperts.config.model import GraftConfig
from flexperts.costs.speed import Workload, set_up, train
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import generate
from flexperts.evaluation.scores import EvaluationSettings, evaluate
from flexperts.modeling.load import LoadedBase
from flexperts.moe.experts import find_experts
from flexperts.selection.selection import CalibrationSettings, score_experts
from flexperts.serving.contract import ModelName, Sampling
from flexperts.serving.engine.batch import Batch, RequestState
from flexperts.serving.engine.decoding import Decoding
from flexperts.testing import byte_tokenizer, save_tiny_base

BUDGETS = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text(encoding="utf-8"))
METHODS = {
    "fedavg": ("method.name=fedavg",),
    "flex": ("method.name=flex", "graft.output=expert", "graft.calibration_tokens=64"),
    "flex difference": ("method.name=flex", "graft.output=difference", "graft.calibration_tokens=64"),
    "flex in place": ("method.name=flex", "graft.place=in_place", "graft.calibration_tokens=64"),
    "flex low rank": ("method.name=flex", "graft.output=expert", "graft.rank=4", "graft.calibration_tokens=64"),
}
Kinds = dict[str, Counter[str]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, LoadedBase]:
    """The same base with two and with three layers."""
    folder = tmp_path_factory.mktemp("layers")
    return {n: loaded(save_tiny_base(folder / str(n), num_hidden_layers=n))[0] for n in (2, 3)}


def counted(counts: Counts, call: Callable[[], object]) -> Kinds:
    counts.reset()
    call()
    return {kind: getattr(counts, kind).copy() for kind in ("launches", "waits", "uploads", "fetched")}


def more(longer: Kinds, shorter: Kinds) -> Kinds:
    """Return what one run has more than another, by place."""
    found: Kinds = {}
    for kind, places in longer.items():
        places.subtract(shorter[kind])
        found[kind] = Counter({place: number for place, number in places.items() if number})
    return found


def check(name: str, unit: str, found: Kinds) -> None:
    totals = {kind: places.total() for kind, places in found.items()}
    allowed = BUDGETS.get(name, {}).get(unit, {})
    over = {k: dict(found[k].most_common(12)) for k, total in totals.items() if total > allowed.get(k, -1)}
    assert not over, f"[{name!r}.{unit}] needs {totals}, and its budget is {allowed}: {over}"


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step(bases: dict[int, LoadedBase], counts: Counts, name: str) -> None:
    def steps(layers: int, number: int) -> Kinds:
        with set_up(bases[layers], METHODS[name]) as (model, split, config):
            work = Workload(rows=2, prompt=16, response=8, steps=number)
            return counted(counts, lambda: train(model, split, config, work))

    step = {layers: more(steps(layers, 2), steps(layers, 1)) for layers in (2, 3)}
    check(name, "step", step[2])
    check(name, "layer", more(step[3], step[2]))


def test_a_further_micro_batch_of_a_step(bases: dict[int, LoadedBase], counts: Counts) -> None:
    def step(rows: int) -> Kinds:
        settings = (f"training.batch_size={rows}", "training.micro_batch_size=2")
        with set_up(bases[2], METHODS["fedavg"], settings) as (model, split, config):
            work = Workload(rows=rows, prompt=16, response=8, steps=1)
            return counted(counts, lambda: train(model, split, config, work))

    check("fedavg", "micro_batch", more(step(6), step(4)))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra")
def test_a_training_step_on_a_quantized_base(tmp_path: Path, counts: Counts) -> None:
    def steps(layers: int, number: int) -> Kinds:
        base, _ = loaded(save_tiny_base(tmp_path / str(layers), num_hidden_layers=layers), "model.quantization=nf4")
        with set_up(base, METHODS["flex"]) as (model, split, config):
            work = Workload(rows=2, prompt=16, response=8, steps=number)
            return counted(counts, lambda: train(model, split, config, work))

    step = {layers: more(steps(layers, 2), steps(layers, 1)) for layers in (2, 3)}
    check("flex on nf4", "step", step[2])
    check("flex on nf4", "layer", more(step[3], step[2]))


def answered(counts: Counts, base: LoadedBase, model: Any) -> Kinds:
    """Return what a token of every row of a batch costs."""
    encoder = PromptEncoder(base.tokenizer, "alpaca", 64)

    def tokens(number: int) -> Kinds:
        def answer() -> None:
            prompts = [[5, 6, 7], [8, 9]]
            made, _ = generate(model, encoder, prompts, max_new_tokens=number, batch_size=2, precision="bf16")
            assert made.tokens == number

        return counted(counts, answer)

    return more(tokens(4), tokens(3))


def test_a_token_of_the_evaluation(bases: dict[int, LoadedBase], counts: Counts) -> None:
    check("evaluation", "token", answered(counts, bases[2], bases[2].model))


@pytest.mark.parametrize("name", METHODS)
def test_a_token_of_a_personal_model(bases: dict[int, LoadedBase], counts: Counts, name: str) -> None:
    with set_up(bases[2], METHODS[name]) as (model, _, _):
        model.eval()
        check(name, "token", answered(counts, bases[2], model))


def test_a_batch_whose_loss_is_scored(bases: dict[int, LoadedBase], counts: Counts) -> None:
    base = bases[2]
    encoder = PromptEncoder(base.tokenizer, "alpaca", 256)
    settings = EvaluationSettings(max_new_tokens=1, batch_size=2, precision="bf16", answers=False)

    def batches(number: int) -> Kinds:
        rows = [Row("Who?", answer) for answer in ("I", "Me") * number]
        return counted(counts, lambda: evaluate(base.model, encoder, rows, settings))

    check("evaluation", "batch", more(batches(3), batches(2)))


def test_a_batch_of_mmlu(bases: dict[int, LoadedBase], counts: Counts) -> None:
    harness = pytest.importorskip("flexperts.evaluation.harness")
    base = bases[2]
    live = harness.LiveModel(base.model, base.tokenizer, harness.Forward(batch_size=2, precision="bf16"))

    def batches(number: int) -> Kinds:
        prompts = [[5, 6, *range(7, 7 + n % 2), 8 + n] for n in range(2 * number)]
        asked = [(("", ""), prompt, [letter]) for prompt in prompts for letter in (65, 66, 67, 68)]
        return counted(counts, lambda: live._loglikelihood_tokens(asked))

    check("mmlu", "batch", more(batches(3), batches(2)))


def test_a_batch_whose_experts_are_scored(tmp_path: Path, counts: Counts) -> None:
    settings = CalibrationSettings(GraftConfig(calibration_tokens=10**6), 2, 0, "bf16")

    def batches(layers: int, number: int) -> Kinds:
        sizes = {"num_experts": 60, "moe_intermediate_size": 256, "num_hidden_layers": layers}
        model = loaded(save_tiny_base(tmp_path / str(layers), **sizes))[0].model
        experts = find_experts(model)
        rows = [Example(tuple(range(3, 43)), 30)] * (2 * number)
        return counted(counts, lambda: score_experts(model, experts, rows, settings, torch.Generator()))

    batch = {layers: more(batches(layers, 3), batches(layers, 2)) for layers in (2, 3)}
    check("selection from 60 experts", "batch", batch[2])
    check("selection from 60 experts", "layer", more(batch[3], batch[2]))


class OneModel:
    """A lane of a batch whose rows all have the base itself."""

    def read(self, prompts: object) -> None:
        pass

    def select(self, models: object) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_token_of_a_served_batch(bases: dict[int, LoadedBase], counts: Counts, temperature: float) -> None:
    base = bases[2]
    batch = Batch(base.model, OneModel(), PromptEncoder(base.tokenizer, "alpaca", 64), "bf16")  # type: ignore[arg-type]
    model = ModelName("a", "global")
    answers = [Decoding(byte_tokenizer(), (), Sampling(9, temperature, seed=n)) for n in range(4)]
    rows = [RequestState(model, [5, 6, 7 + n], answer, 99, lambda _: None) for n, answer in enumerate(answers)]
    batch.add(rows)
    check("serving, drawn" if temperature else "serving", "token", counted(counts, batch.step))
    assert all(len(row.answer.tokens) == 2 for row in rows)
