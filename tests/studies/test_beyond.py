"""What models do on other clients' rows and on general tasks, against scoring them by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flexperts.data.rows import Row
from flexperts.engines.run import run_federation
from flexperts.errors import DataError
from flexperts.evaluation.scores import rouge_l
from flexperts.finished.trained import TrainedRun
from flexperts.recipe import load_recipe
from flexperts.studies.collect import collect_run

CLIENTS = ["bank", "cafe", "farm"]
Scores = dict[str, float]


@pytest.fixture(scope="module")
def trained(single: Path) -> Iterator[TrainedRun]:
    run = TrainedRun(single)
    yield run
    run.close()


def rows(path: Path, count: int) -> list[Row]:
    lines = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [Row(line["instruction"], line["response"]) for line in lines]


@torch.no_grad()
def by_hand(run: TrainedRun, client: str, state: Any, scored: list[Row]) -> Scores:
    """One row at a time, no padding, the whole vocabulary projection; answers through chat."""
    encoder = run.workspace.encoder
    with run.client(client).in_state(run.request(client), state) as (model, _):
        total, count = 0.0, 0
        for row in scored:
            example = encoder.encode(row)
            prompt, response = list(example.prompt), list(example.input_ids[example.prompt_length :])
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits.double(), torch.tensor(response), reduction="sum"))
            count += len(response)
    answers = [run.generate(client, row.instruction, state=state) for row in scored]
    points = rouge_l(answers, [row.response for row in scored])
    return {"rouge_l": sum(points) / len(points), "nll": total / count, "rows": len(scored)}


def same(found: Scores, expected: Scores) -> None:
    assert found["rows"] == expected["rows"]
    assert found["rouge_l"] == pytest.approx(expected["rouge_l"], rel=1e-12)
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def beyond(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "beyond.json").read_text()))


def test_every_personalized_model_is_scored_on_every_others_first_rows(
    work: Path, single: Path, trained: TrainedRun
) -> None:
    found = beyond(single)["others"]
    assert list(found) == ["personalized"]
    assert list(found["personalized"]) == CLIENTS
    for client, scores in found["personalized"].items():
        others = [name for name in CLIENTS if name != client]
        assert list(scores["by_client"]) == others
        hand = {
            o: by_hand(trained, client, "personalized", rows(work / "clients" / o / "test.jsonl", 2))
            for o in others
        }
        for other in others:
            same(scores["by_client"][other], hand[other])
        for kind in ("rouge_l", "nll"):
            assert scores[kind] == pytest.approx(sum(h[kind] for h in hand.values()) / 2, rel=1e-5)
        assert scores["rows"] == 4
    nlls = {scores["nll"] for scores in found["personalized"].values()}
    assert len(nlls) == 3


def test_general_tasks_are_scored_once_for_all_and_for_every_personalized_model(
    work: Path, single: Path, trained: TrainedRun
) -> None:
    found = beyond(single)["general"]
    who = {"zero_shot": CLIENTS[:1], "global": CLIENTS[:1], "personalized": CLIENTS}
    assert {state: list(scores) for state, scores in found.items()} == who
    tasks = rows(work / "general.jsonl", 2)
    for state, scores in found.items():
        for client, numbers in scores.items():
            same(numbers, by_hand(trained, client, state, tasks))
    reference = beyond(single / "reference")
    assert list(reference) == ["general"]  # fedavg has no personalized models
    assert reference["general"]["zero_shot"] == found["zero_shot"]


def test_global_models_that_differ_by_client_are_each_scored(work: Path, tmp_path: Path) -> None:
    ranks = ("method.name=hetlora", "method.options={ranks={bank=2}}", "training.local_steps=1")
    run_federation(load_recipe(work / "recipe.toml", ranks), tmp_path / "run")
    found = beyond(tmp_path / "run")
    assert list(found["others"]) == ["global"]
    assert list(found["others"]["global"]) == list(found["general"]["global"]) == CLIENTS
    assert list(found["general"]["zero_shot"]) == CLIENTS[:1]
    run = TrainedRun(tmp_path / "run")
    try:
        cafe = rows(work / "clients" / "cafe" / "test.jsonl", 2)
        same(found["others"]["global"]["bank"]["by_client"]["cafe"], by_hand(run, "bank", "global", cafe))
    finally:
        run.close()
    comparison = collect_run(tmp_path / "run")["entries"][0]
    noted = found["others"]["global"]["bank"]["nll"]
    assert comparison["scores"]["global"]["others"]["nll"]["clients"]["bank"]["mean"] == pytest.approx(noted)


def test_nothing_is_measured_that_nobody_asked_for(work: Path, tmp_path: Path) -> None:
    settings = ("evaluation.others_rows=0", "method.name=zero_shot", "knowledge={}")
    run_federation(load_recipe(work / "recipe.toml", settings), tmp_path / "run")
    assert not (tmp_path / "run" / "beyond.json").exists()


def test_one_client_has_no_others(work: Path, tmp_path: Path) -> None:
    alone = f'data={{clients = {{bank = {{train = "{work}/clients/bank/train.jsonl"}}}}}}'
    settings = (alone, "federation.rounds=1", "training.local_steps=1", "method.name=local")
    run_federation(load_recipe(work / "recipe.toml", settings), tmp_path / "run")
    assert list(beyond(tmp_path / "run")) == ["general"]


def test_tasks_that_are_not_there_are_missed_before_training(work: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        run_federation(load_recipe(work / "recipe.toml", ("knowledge.general=none.jsonl",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
