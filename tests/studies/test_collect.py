"""Every number of a comparison, computed again from what its runs left on the disk."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from flexperts.evaluation.words import TOKENIZER
from flexperts.files import opened, sealed
from flexperts.methods.pfedmoe_style import PFedMoEStyle
from flexperts.methods.server_optimizers import FedAdam
from flexperts.studies.collect import answer_counts, collect_comparison, statistic
from flexperts.studies.finished import Finished

Entries = dict[str, dict[str, Any]]
Json = dict[str, Any]
CLIENTS = ["bank", "cafe", "farm"]
STATES = {
    "fedavg": ["zero_shot", "global"],
    "flex": ["zero_shot", "global", "personalized"],
    "local": ["zero_shot", "personalized"],
    "zero_shot": ["zero_shot"],
    "k2": ["zero_shot", "global", "personalized"],
}
every_entry = pytest.mark.parametrize("name", STATES)


class Run:
    """A run's files, read with nothing of the package."""

    def __init__(self, out: Path, name: str, seed: int) -> None:
        self.path = out / "runs" / name / f"seed-{seed}"

    def json(self, name: str) -> Json:
        return dict(json.loads((self.path / name).read_text(encoding="utf-8")))

    def lines(self, name: str) -> list[Json]:
        return [json.loads(line) for line in (self.path / name).read_text(encoding="utf-8").splitlines()]

    def own(self, client: str, state: str, kind: str, rows: int | None = None) -> float:
        """Return a client's score from its first rows: ROUGE-L by rows, NLL by tokens."""
        found = [line["scores"][state] for line in self.lines(f"predictions/{client}.jsonl")][:rows]
        if kind == "rouge_l":
            return fmean(row["rouge_l"] for row in found)
        return math.fsum(r["nll"] * r["tokens"] for r in found) / sum(r["tokens"] for r in found)


def runs(out: Path, name: str) -> list[Run]:
    return [Run(out, name, seed) for seed in (0, 1)]


def is_statistic(found: Json, seeds: list[dict[str, float]]) -> None:
    """Compare a STAT with the values it is of: one mapping of clients for each seed."""
    means = [fmean(seed.values()) for seed in seeds]
    assert found["seeds"] == pytest.approx(means, rel=1e-12)
    assert found["mean"] == pytest.approx(fmean(means), rel=1e-12)
    assert found["std"] == pytest.approx(stdev(means), rel=1e-9, abs=1e-12)
    assert list(found["clients"]) == list(seeds[0])
    for client, numbers in found["clients"].items():
        values = [seed[client] for seed in seeds]
        assert numbers["mean"] == pytest.approx(fmean(values), rel=1e-12)
        assert numbers["std"] == pytest.approx(stdev(values), rel=1e-9, abs=1e-12)


def test_the_head(comparison: Json, compared: Path, work: Path) -> None:
    assert comparison["kind"] == "comparison"
    assert (comparison["title"], comparison["split"], comparison["reference"]) == ("out", "test", "flex")
    assert (comparison["confidence"], comparison["resamples"]) == (0.95, 500)
    assert (comparison["seeds"], comparison["clients"]) == ([0, 1], CLIENTS)
    assert [entry["name"] for entry in comparison["entries"]] == list(STATES)
    assert comparison["environment"] == Run(compared, "flex", 0).json("environment.json")
    assert 'folder = "clients"' in comparison["recipe"]
    assert str(work) not in comparison["recipe"]
    assert "graft.experts=2" not in comparison["recipe"]
    json.dumps(comparison, allow_nan=False)


@every_entry
def test_what_an_entry_is(entries: Entries, name: str) -> None:
    entry = entries[name]
    assert entry["method"] == ("flex" if name == "k2" else name)
    own = [] if name == "flex" else ["method.options={}"]
    assert entry["settings"] == (["graft.experts=2"] if name == "k2" else [f"method.name={name}", *own])
    assert (entry["seeds"], entry["own_state"]) == ([0, 1], STATES[name][-1])
    assert list(entry["scores"]) == STATES[name]


@every_entry
def test_own_scores_are_means_of_rows_then_clients_then_seeds(entries: Entries, compared: Path, name: str) -> None:
    for state in STATES[name]:
        for kind in ("rouge_l", "nll"):
            seeds = [{c: run.own(c, state, kind) for c in CLIENTS} for run in runs(compared, name)]
            is_statistic(entries[name]["scores"][state]["own"][kind], seeds)


def test_the_numbers_could_tell_a_wrong_mean(entries: Entries, compared: Path) -> None:
    """Clients of unequal size, rows of unequal length, seeds that differ: each other mean is another number."""
    for kind, state in (("rouge_l", "zero_shot"), ("nll", "zero_shot"), ("nll", "personalized")):
        rows = [
            line["scores"][state][kind]
            for run in runs(compared, "flex")
            for c in CLIENTS
            for line in run.lines(f"predictions/{c}.jsonl")
        ]
        assert abs(fmean(rows) - entries["flex"]["scores"][state]["own"][kind]["mean"]) > 1e-4
    assert entries["flex"]["scores"]["personalized"]["own"]["nll"]["std"] > 1e-4


@pytest.mark.parametrize("name", ["fedavg", "flex", "local", "zero_shot"])
@pytest.mark.parametrize("state", ["zero_shot", "global"])
def test_a_shared_model_scores_on_others_rows_what_the_others_report(
    entries: Entries, compared: Path, name: str, state: str
) -> None:
    if state not in STATES[name]:
        return
    for kind in ("rouge_l", "nll"):
        seeds = [
            {c: fmean(run.own(o, state, kind, rows=2) for o in CLIENTS if o != c) for c in CLIENTS}
            for run in runs(compared, name)
        ]
        is_statistic(entries[name]["scores"][state]["others"][kind], seeds)


@every_entry
def test_what_lies_beyond_the_own_rows_comes_from_its_file(entries: Entries, compared: Path, name: str) -> None:
    beyond = [run.json("beyond.json") for run in runs(compared, name)]
    assert all(("others" in seed) == ("personalized" in STATES[name]) for seed in beyond)
    for state, scores in entries[name]["scores"].items():
        who = CLIENTS if state == "personalized" else CLIENTS[:1]
        assert scores["mmlu"] is None
        for kind in ("rouge_l", "nll"):
            is_statistic(scores["general"][kind], [{c: b["general"][state][c][kind] for c in who} for b in beyond])
            if state == "personalized":
                seeds = [{c: b["others"][state][c][kind] for c in who} for b in beyond]
                is_statistic(scores["others"][kind], seeds)


@every_entry
def test_what_training_cost_is_told_by_row_with_an_interval(entries: Entries, compared: Path, name: str) -> None:
    entry, states = entries[name], [state for state in STATES[name] if state != "zero_shot"]
    assert list(entry["ability"]) == states
    for state in states:
        for kind in ("rouge_l", "nll"):
            test, scores = entry["ability"][state][kind], entry["scores"]
            means = [scores[s]["general"][kind]["mean"] for s in (state, "zero_shot")]
            assert test["difference"] == pytest.approx(means[0] - means[1], rel=1e-9)
            assert test["low"] <= test["difference"] <= test["high"]
            assert 0 < test["p"] <= 1
    for run in runs(compared, name):
        for state, clients in run.json("beyond.json")["general"].items():
            for found in clients.values():
                each, tokens = found["by_row"], [row["tokens"] for row in found["by_row"]]
                assert found["rouge_l"] == pytest.approx(fmean(row["rouge_l"] for row in each)), state
                assert found["nll"] == pytest.approx(fmean([row["nll"] for row in each], tokens)), state


def test_runs_without_rows_on_general_tasks_have_no_interval(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "old")
    for path in (tmp_path / "old").rglob("beyond.json"):
        beyond = json.loads(path.read_text())
        for clients in beyond["general"].values():
            for found in clients.values():
                del found["by_row"]
        path.write_text(json.dumps(beyond))
    found = collect_comparison(tmp_path / "old")["entries"]
    assert [entry["ability"] for entry in found] == [{}] * len(found)
    assert all(entry["scores"][entry["own_state"]]["general"] for entry in found)


def test_what_runs_do_not_share_is_told_of_each(compared: Path, tmp_path: Path) -> None:
    """Environments that differ stand side by side; a group of tensors that a seed never sent counts as 0 there."""
    out = shutil.copytree(compared, tmp_path / "mixed")
    environment, summary = (out / "runs" / "flex" / "seed-1" / n for n in ("environment.json", "summary.json"))
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"threads": 99}))
    numbers = opened(summary, json.loads(summary.read_text()))
    numbers["bytes"]["groups"]["uplink"]["new"] = 10
    summary.write_text(json.dumps(sealed(numbers)))
    found = collect_comparison(out)
    assert found["environment"]["threads"] == [Run(compared, "flex", 0).json("environment.json")["threads"], 99]
    flex = next(entry for entry in found["entries"] if entry["name"] == "flex")
    assert flex["bytes"]["groups"]["uplink"]["new"] == 5


def test_a_methods_budget_is_noted_also_in_a_comparison_from_before(comparison: Json, tmp_path: Path) -> None:
    assert {entry["budget_note"] for entry in comparison["entries"]} == {""}
    older = json.loads(json.dumps(comparison))
    methods = ("fedadam", "pfedmoe_style", "a method of a package that is not installed")
    for entry, method in zip(older["entries"], methods, strict=False):
        del entry["budget_note"]
        entry["method"] = method
    (tmp_path / "comparison.json").write_text(json.dumps(older))
    found = [entry["budget_note"] for entry in collect_comparison(tmp_path)["entries"]]
    assert found[:3] == [FedAdam.budget_note, PFedMoEStyle.budget_note, ""]


def test_an_entrys_settings_do_not_tell_where_its_files_lie(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "elsewhere")
    claim = json.loads((out / "compare.json").read_text())
    claim["entries"]["k2"] = [
        "graft.experts=2",
        f"data.folder='{tmp_path}/wards'",
        f"model.base={tmp_path}/base",
        f'data.clients={{a = {{train = "{tmp_path}/a.jsonl"}}}}',
        'compare.newcomers=["north"]',
    ]
    (out / "compare.json").write_text(json.dumps(claim))
    entry = next(e for e in collect_comparison(out)["entries"] if e["name"] == "k2")
    assert entry["settings"] == [
        "graft.experts=2", "data.folder=wards", "model.base=base", 'data.clients={"a": {"train": "a.jsonl"}}',
        'compare.newcomers=["north"]',
    ]  # fmt: skip


def test_bytes_of_an_older_run_are_means_over_messages_with_weights_too(compared: Path, tmp_path: Path) -> None:
    """Its summary has them over all messages; one entry's seeds must have one meaning."""
    out = shutil.copytree(compared, tmp_path / "older")
    run = out / "runs" / "flex" / "seed-0"
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    client = next(iter(rounds[0]["uplink"]))
    rounds[0]["declared"]["uplink"][client], rounds[0]["uplink"][client] = 0, 7  # a reply without weights
    del rounds[0]["sha256"]
    lines = [sealed(rounds[0]), *rounds[1:]]
    (run / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = opened(run / "summary.json", json.loads((run / "summary.json").read_text()))
    del summary["bytes"]["replies_with_weights"]
    (run / "summary.json").write_text(json.dumps(sealed(summary)))
    before, found = (
        next(e for e in collect_comparison(o)["entries"] if e["name"] == "flex") for o in (compared, out)
    )
    for way in ("uplink", "downlink"):
        key = f"{way}_per_client_per_round"
        assert found["bytes"][key] == pytest.approx(before["bytes"][key], rel=1e-3)
    assert found["bytes"]["replies_with_weights"] == before["bytes"]["replies_with_weights"] - 0.5
    assert found["bytes"]["join_total"] == before["bytes"]["join_total"]


@pytest.mark.parametrize("ahead", [["flex"], ["fedavg", "local"]])
def test_the_few_entries_with_other_seeds_are_named(compared: Path, tmp_path: Path, ahead: list[str]) -> None:
    """As while a second seed runs; the reference, flex, may be one of them."""
    out = shutil.copytree(compared, tmp_path / "out")
    for path in (out / "runs").iterdir():
        if path.name not in ahead:
            shutil.rmtree(path / "seed-1")
    found = {entry["name"]: entry.get("other_seeds", False) for entry in collect_comparison(out)["entries"]}
    assert [name for name, other in found.items() if other] == [name for name in found if name in ahead]
    assert len(found) > 2 * len(ahead)


def test_a_copy_of_a_run_is_no_run(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    shutil.copytree(out / "runs" / "flex" / "seed-0", out / "runs" / "flex" / "seed-0 copy")
    assert collect_comparison(out)["seeds"] == [0, 1]


@every_entry
def test_bytes_parameters_and_seconds(entries: Entries, compared: Path, name: str) -> None:
    entry, logs = entries[name], [run.lines("rounds.jsonl") for run in runs(compared, name)]
    sizes = entry["bytes"]
    for way in ("uplink", "downlink"):
        sent = [[size for log in seed for size in log[way].values()] for seed in logs]
        assert sizes[f"{way}_total"] == fmean(sum(seed) for seed in sent)
        each = fmean(fmean(seed) if seed else 0.0 for seed in sent)
        assert sizes[f"{way}_per_client_per_round"] == pytest.approx(each, rel=1e-12)
        declared = [value for seed in logs for log in seed for value in log["declared"][way].values()]
        groups = [g for seed in logs for log in seed for g in log["groups"][way].values()]
        assert [sum(g.values()) for g in groups] == declared
        names = {key for g in groups for key in g}
        expected = {key: fmean(g.get(key, 0) for g in groups) for key in names}
        assert sizes["groups"][way] == pytest.approx(expected, rel=1e-12)
    assert sizes["personal_sent"] == 0
    for group, count in entry["parameters"].items():
        trained = [c[f"{group}_parameters"] for log in logs[0] for c in log["clients"].values()]
        assert count == max(trained, default=0)
    taken = [run.json("summary.json")["seconds"] for run in runs(compared, name)]
    assert entry["seconds"] == {key: pytest.approx(fmean(s[key] for s in taken)) for key in taken[0]}


def test_parameters_are_those_of_the_tiny_model(entries: Entries) -> None:
    """q 32x32, k and v 32x16 with rank 8 in two layers; experts of 32x32 and 32x16 with a gate of 32 and a bias."""
    shared = 2 * 8 * ((32 + 32) + 2 * (32 + 16))
    expert = 2 * (32 * 32 + 32 * 16 + 33)
    assert entries["flex"]["parameters"] == {"shared": shared, "personal": expert}
    assert entries["k2"]["parameters"]["personal"] > expert
    assert entries["fedavg"]["parameters"] == {"shared": shared, "personal": 0}
    assert entries["zero_shot"]["parameters"] == {"shared": 0, "personal": 0}


@every_entry
def test_curves(entries: Entries, compared: Path, name: str) -> None:
    logs, found = [run.lines("rounds.jsonl") for run in runs(compared, name)], entries[name]["curves"]
    trained = name != "zero_shot"
    assert list(found) == [*(["training"] if trained else []), *STATES[name]]
    for state, scores in found.items():
        assert list(scores) == (["nll"] if state == "training" else ["rouge_l", "nll"])
        for kind, curve in scores.items():
            part, key = ("clients", "loss") if state == "training" else ("scores", f"{kind}.{state}")
            assert curve["rounds"] == [log["number"] for log in logs[0]]
            for i in range(len(curve["rounds"])):
                seeds = [fmean(client[key] for client in seed[i][part].values()) for seed in logs]
                assert curve["mean"][i] == pytest.approx(fmean(seeds), rel=1e-12)
                assert (curve["low"][i], curve["high"][i]) == pytest.approx((min(seeds), max(seeds)), rel=1e-12)
    if trained:
        assert found["training"]["nll"]["rounds"] == [1, 2]
        assert found["training"]["nll"]["low"] < found["training"]["nll"]["high"]
        own = entries[name]["scores"][STATES[name][-1]]["own"]["nll"]["mean"]
        assert found[STATES[name][-1]]["nll"]["mean"][-1] == pytest.approx(own, rel=1e-12)


@every_entry
def test_routing(entries: Entries, compared: Path, name: str) -> None:
    entry, own = entries[name], STATES[name][-1]
    lines = {(run.path.name, c): run.lines(f"routing/{c}.jsonl") for run in runs(compared, name) for c in CLIENTS}
    last = max(line["round"] for line in lines["seed-0", "bank"])
    for state in STATES[name]:
        for client in CLIENTS:
            (layers,) = (
                line["layers"]
                for line in lines["seed-0", client]
                if (line["round"], line["state"]) == (last, state)
            )
            for layer in layers.values():
                assert len(layer.pop("co_selection")) == len(layer["utilisation"])  # large, and shown nowhere
            assert entry["routing"][state][client] == layers
    over = entry["routing_rounds"]
    assert over["rounds"] == [0, *range(1, last + 1)]
    for key in ("entropy", "divergence", "agreement", "opening"):
        for number, value in zip(over["rounds"], over[key], strict=True):
            wanted = (1, "zero_shot") if number == 0 and last else (number, own)
            numbers = [
                layer[key]
                for found in lines.values()
                for line in found
                if (line["round"], line["state"]) == wanted
                for layer in line["layers"].values()
                if layer.get(key) is not None
            ]
            # a list is one number per slot
            flat = [fmean(n) if isinstance(n, list) else n for n in numbers]
            assert value == (pytest.approx(fmean(flat), rel=1e-12) if flat else None), (key, number)
    opened = name in ("flex", "k2", "local")
    assert [value is not None for value in over["opening"][1:]] == [opened] * last
    assert over["opening"][0] is None
    assert over["divergence"][0] == 0


@every_entry
def test_selection(entries: Entries, compared: Path, name: str) -> None:
    found = entries[name]["selection"]
    if name not in ("flex", "k2", "local"):
        assert found is None
        return
    assert sorted(found) == CLIENTS
    for client, layers in found.items():
        kept = runs(compared, name)[0].json(f"selection/{client}.json")
        assert {layer: n["choice"] for layer, n in layers.items()} == kept["choice"]
        for numbers in layers.values():
            assert len(numbers["choice"]) == (2 if name == "k2" else 1)
            best = sorted(range(4), key=lambda expert: numbers["loss"][expert])[: len(numbers["choice"])]
            assert sorted(numbers["choice"]) == sorted(best)


def test_examples_are_the_first_rows_with_everybodys_answers(comparison: Json, compared: Path) -> None:
    assert comparison["examples"] == {}
    examples = collect_comparison(compared, samples=3)["examples"]
    assert list(examples) == CLIENTS
    for client, shown in examples.items():
        lines = {name: Run(compared, name, 0).lines(f"predictions/{client}.jsonl") for name in STATES}
        assert len(shown) == 3
        for i, example in enumerate(shown):
            for key in ("instruction", "context", "response"):
                assert example[key] == lines["flex"][i][key]
            answers = {"zero-shot": lines["flex"][i]["zero_shot"]}
            for name in ("flex", "fedavg", "local", "k2"):
                answers |= {f"{name} {s}": lines[name][i][s] for s in STATES[name] if s != "zero_shot"}
            assert example["answers"] == answers


def test_words_and_answers_of_every_entry_are_noted(comparison: Json, entries: dict[str, Json]) -> None:
    assert comparison["rouge_tokenizer"] == TOKENIZER
    for entry in entries.values():
        assert entry["rouge_tokenizer"] == TOKENIZER
        assert entry["answers"]["max_new_tokens"] == [8]
        assert {c: its["rows"] for c, its in entry["answers"]["clients"].items()} == {
            "bank": 6, "cafe": 8, "farm": 12,
        }  # fmt: skip


def test_answers_are_counted_over_seeds(compared: Path, entries: dict[str, Json]) -> None:
    for client, found in entries["flex"]["answers"]["clients"].items():
        told = [Run(compared, "flex", seed).json("summary.json")["clients"][client]["answers"] for seed in (0, 1)]
        assert found["longer_references"] == sum(its["longer_references"] for its in told)
        for state, count in found["cut"].items():
            assert count == sum(its["cut"][state] for its in told)


def test_runs_of_an_earlier_version_have_no_counts_and_ascii_words(compared: Path) -> None:
    old = Finished.read(compared, "flex", [])
    old.summaries[0].pop("rouge_tokenizer")
    assert old.rouge_tokenizer == f"rouge-score, {TOKENIZER}"
    del old.summaries[1]["clients"]["bank"]["answers"]
    assert answer_counts(old) is None


def test_a_mean_over_what_is_missing_is_missing() -> None:
    found = statistic([{"a": 1.0, "b": 3.0}, {"a": None, "b": 5.0}])
    assert (found["mean"], found["std"], found["seeds"]) == (None, None, [2.0, None])
    assert found["clients"] == {"a": {"mean": None, "std": None}, "b": {"mean": 4.0, "std": 2**0.5}}
