"""What a run scores and notes: validation or test rows, answers or NLL alone, bytes by group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.run import RunConfig
from flexperts.data.clients import load_clients
from flexperts.engines.run import run_federation

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
CLIENTS = ["clinic", "help_desk", "law_firm", "shop"]
SHORT = ("training.local_steps=1", "evaluation.max_new_tokens=2")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_validation_rows_are_scored_in_place_of_test_rows(recipe: Recipe, tmp_path: Path) -> None:
    held = ("data.validation_fraction=0.4", "federation.rounds=1", *SHORT)
    rows = load_clients(recipe(*held).data, 0)
    nll = {}
    for split in ("test", "validation"):
        summary = run_federation(recipe(*held, f"evaluation.split={split}"), tmp_path / split)
        assert summary["split"] == split
        nll[split] = summary["mean"]["nll"]["personalized"]
        for client in CLIENTS:
            expected = getattr(rows[client], split)
            scored = lines(tmp_path / split / "predictions" / f"{client}.jsonl")
            assert [(s["instruction"], s["context"], s["response"]) for s in scored] == [
                (row.instruction, row.context, row.response) for row in expected
            ]
            assert summary["clients"][client]["scored_rows"] == len(expected) > 0
            assert summary["clients"][client]["train_rows"] == len(rows[client].train)
    assert nll["test"] != nll["validation"]
    # what is scored changes nothing of what is trained
    weights = [(tmp_path / s / "shared" / "adapter_model.safetensors").read_bytes() for s in nll]
    assert weights[0] == weights[1]


def test_training_never_sees_validation_rows(recipe: Recipe, tmp_path: Path) -> None:
    """Other answers in the held-out rows leave the same weights; another answer in a train row does not."""
    folder = tmp_path / "data"
    folder.mkdir()
    train = [{"instruction": f"question {i}", "response": f"answer {i}"} for i in range(12)]
    test = [{"instruction": "asked", "response": "said"}]

    def run(name: str, changed: set[str]) -> dict[str, bytes]:
        told = [r | {"response": "something else"} if r["instruction"] in changed else r for r in train]
        for side, rows in (("train", told), ("test", test)):
            (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_federation(config, tmp_path / name)
        kept = sorted((tmp_path / name).rglob("*.safetensors"))
        return {
            str(p.relative_to(tmp_path / name)): p.read_bytes() for p in kept if p.name != "checkpoint.safetensors"
        }

    files = f'{{train = "{folder}/train.jsonl", test = "{folder}/test.jsonl"}}'
    config = recipe(
        f"data={{validation_fraction = 0.25, clients = {{bank = {files}}}}}",
        "training.local_epochs=2", "federation.rounds=1", "evaluation.max_new_tokens=2",
    )  # fmt: skip
    first = run("first", set())
    assert {"personal/bank.safetensors", "shared/adapter_model.safetensors"} <= first.keys()
    rows = load_clients(config.data, 0)["bank"]
    assert (len(rows.train), len(rows.validation)) == (9, 3)
    assert run("held", {row.instruction for row in rows.validation}) == first
    assert run("trained", {rows.train[0].instruction}) != first


@pytest.mark.parametrize("method", ["flex", "local"])
def test_answers_can_wait_for_the_last_round(recipe: Recipe, tmp_path: Path, method: str) -> None:
    settings = (f"method.name={method}", "evaluation.every=1", "evaluation.rows=2", *SHORT)
    states = ["zero_shot", "global", "personalized"] if method == "flex" else ["zero_shot", "personalized"]
    nll = {f"nll.{state}" for state in states}
    rouge = {f"rouge_l.{state}" for state in states}
    found = {}
    for answers in ("always", "last"):
        run_federation(recipe(*settings, f"evaluation.answers={answers}"), tmp_path / answers)
        found[answers] = [log["scores"] for log in lines(tmp_path / answers / "rounds.jsonl")]
    assert [sorted(scores) for scores in found["last"]] == [CLIENTS] * 2
    for client in CLIENTS:
        first, last = (scores[client] for scores in found["last"])
        assert set(first) == nll | {"rows"}
        assert set(last) == nll | rouge | {"rows"}
        assert last == found["always"][1][client]
        assert first == {key: v for key, v in found["always"][0][client].items() if key not in rouge}
    for client in CLIENTS:
        paths = [tmp_path / answers / "predictions" / f"{client}.jsonl" for answers in found]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("method", ["flex", "local", "moe_fedavg", "scaffold"])
def test_bytes_by_group_add_up_to_what_is_declared(recipe: Recipe, tmp_path: Path, method: str) -> None:
    plain = ("training.optimizer=sgd",) if method == "scaffold" else ()
    config = recipe(f"method.name={method}", "evaluation.rows=1", "federation.rounds=1", *SHORT, *plain)
    summary = run_federation(config, tmp_path / "run")
    (log,) = lines(tmp_path / "run" / "rounds.jsonl")
    for way in ("uplink", "downlink"):
        assert list(log["groups"][way]) == CLIENTS
        sums = {client: sum(groups.values()) for client, groups in log["groups"][way].items()}
        assert sums == log["declared"][way]
        assert sum(summary["bytes"]["groups"][way].values()) == sum(sums.values()) / 4
    groups = set(log["groups"]["uplink"]["shop"])
    lora = {"attention LoRA A", "attention LoRA B"}
    known = {"flex": lora, "local": set(), "moe_fedavg": lora | {"experts"}}
    assert groups == known.get(method, groups)
    assert method != "scaffold" or (groups > lora and all(g.startswith("derived ") for g in groups - lora))


def test_every_rows_scores_are_kept_beside_its_answers(recipe: Recipe, byte_base: Path, tmp_path: Path) -> None:
    config = recipe(f"model.base={byte_base}", "federation.rounds=1", *SHORT)
    summary = run_federation(config, tmp_path / "run")
    for client in CLIENTS:
        kept = lines(tmp_path / "run" / "predictions" / f"{client}.jsonl")
        for state in ("zero_shot", "global", "personalized"):
            rows = [line["scores"][state] for line in kept]
            assert [row["tokens"] for row in rows] == [len(line["response"].encode()) + 1 for line in kept]
            nll = sum(row["nll"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
            assert summary["clients"][client]["nll"][state] == pytest.approx(nll, rel=1e-12)
            points = sum(row["rouge_l"] for row in rows) / len(rows)
            assert summary["clients"][client]["rouge_l"][state] == pytest.approx(points)
