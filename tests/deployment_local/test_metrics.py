"""Metrics are those of the request log, the ledger and the rounds, and the dashboard names no others."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flexperts.artifacts import RunDirectory
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.server_app import _measured
from flexperts.deployment.settings import METRICS
from flexperts.deployment.worker import Worker
from flexperts.errors import ArtifactError, ConfigError
from flexperts.recipe import load_silo
from flexperts.server.round_log import RoundLog
from flexperts.serving.http.metrics import Metrics

from .asking import RUN, converse

DEPLOY = Path(__file__).parents[2] / "deploy"
Values = dict[tuple[str, ...], float]


def values(path: Path) -> dict[str, Values]:
    """Return metric -> values of its labels, in the order of their names -> value."""
    found: dict[str, Values] = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = tuple(text for _, text in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


@pytest.fixture
def measured(silo_file: Path, tmp_path: Path) -> Iterator[Worker]:
    """A worker with metrics, under the umask of `silo serve`."""
    silo_file.write_text('metrics = "metrics/clinic.prom"\n' + silo_file.read_text())
    (tmp_path / "metrics").mkdir()
    before = os.umask(0o077)
    yield Worker(load_silo(silo_file))
    os.umask(before)


def test_a_silos_metrics_are_those_of_its_request_log_and_ledger(
    measured: Worker, handed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = tmp_path / "metrics" / "clinic.prom"
    assert values(path)["flexperts_silo_epsilon"] == {("clinic",): 0.0}
    recipe = handed().to_toml()
    for _ in range(2):
        converse(
            lambda kind, content: deserialize(
                measured.reply(serialize({"kind": kind, "run": RUN, "recipe": recipe}, content))
            )[1]
        )
    measured.reply(b"noise")
    lines = [json.loads(line) for line in (tmp_path / "state" / "requests.jsonl").read_text().splitlines()]
    counts = Counter((line["kind"] or "none", line["outcome"], "clinic") for line in lines)
    found = values(path)
    assert {key: n for key, n in found["flexperts_silo_requests_total"].items() if n} == counts
    assert found["flexperts_silo_requests_total"]["train", "refused", "clinic"] == 0
    assert counts["train", "repeated", "clinic"] == counts["none", "failed", "clinic"] == 1
    for way in ("received", "sent"):
        assert found["flexperts_silo_bytes_total"][way, "clinic"] == sum(line[way] for line in lines)
    trained = [line["seconds"] for line in lines if line["kind"] == "train"]
    assert found["flexperts_silo_request_seconds_sum"]["train", "clinic"] == pytest.approx(sum(trained))
    assert found["flexperts_silo_round"] == {("flex", RUN, "clinic"): 1.0}
    assert found["flexperts_silo_epsilon"] == {("clinic",): math.inf}
    assert "flexperts_silo_epsilon_budget" not in found
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_metrics_that_cannot_be_written_stop_no_worker_that_runs(
    measured: Worker, silo_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics" / "clinic.prom").unlink()
    (tmp_path / "metrics").rmdir()
    with caplog.at_level(logging.WARNING):
        assert deserialize(measured.reply(b"noise"))[0] == {"error": "FederationError"}
    assert "clinic.prom: it cannot be written" in caplog.text
    with pytest.raises(ArtifactError, match="cannot be written"):
        Worker(load_silo(silo_file))


def test_the_metrics_file_of_a_silo_has_the_name_that_is_read(silo_file: Path) -> None:
    silo_file.write_text('metrics = "clinic.txt"\n' + silo_file.read_text())
    with pytest.raises(ConfigError, match="metrics"):
        load_silo(silo_file)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of which two of three rounds are done: in the second one, b was missing."""
    made = RunDirectory.create(tmp_path / "runs" / "flu", "[data.silos]\n[federation]\nrounds = 3\n")
    both = {"participants": ["a", "b"], "planned": 3, "downlink": {"a": 5, "b": 7}}
    for number, used in ((1, ["a", "b"]), (2, ["a"])):
        record = RoundLog(
            number,
            clients={name: {"loss": 1.0, "rows": 4} for name in used},
            uplink=dict.fromkeys(used, 100),
            seconds={"training": 60.0 * number, "evaluation": 4.0},
            missing=sorted({"a", "b"} - set(used)),
            privacy={"epsilon": 1.5 * number, "delta": 1e-5},
            **both,
        )
        made.append_round(vars(record))
    return made


def test_a_runs_metrics_are_those_of_its_rounds(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS, str(tmp_path))
    with _measured(run) as observer:
        observer.round({})
        path = tmp_path / "flexperts_run_flu.prom"
        while_running = path.read_bytes()
    found = values(path)
    assert found == {
        "flexperts_run_rounds_done": {("flu",): 2.0},
        "flexperts_run_rounds_planned": {("flu",): 3.0},
        "flexperts_run_last_round_timestamp_seconds": {("flu",): pytest.approx(run.last_round_at())},
        "flexperts_run_state": {("flu", "running"): 0.0, ("flu", "stopped"): 1.0, ("flu", "finished"): 0.0},
        "flexperts_run_round_seconds": {("training", "flu"): 120.0, ("evaluation", "flu"): 4.0},
        "flexperts_run_bytes": {("uplink", "flu"): 300.0, ("downlink", "flu"): 24.0},
        "flexperts_run_epsilon": {("flu",): 3.0},
        "flexperts_run_silo_late": {("flu", "a"): 0.0, ("flu", "b"): 1.0},
        "flexperts_run_silo_rounds": {
            (outcome, "flu", silo): float(count)
            for silo, counts in {"a": (2, 0, 0), "b": (1, 1, 0)}.items()
            for outcome, count in zip(("used", "missing", "refused"), counts, strict=True)
        },
    }
    assert while_running == path.read_bytes()
    run.write_summary({"clients": []})
    with _measured(run):
        pass
    assert values(path)["flexperts_run_state"]["flu", "finished"] == 1.0


def test_a_run_without_a_folder_for_metrics_or_without_rounds_writes_none(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(METRICS, raising=False)
    with _measured(run) as observer:
        observer.round({})
    monkeypatch.setenv(METRICS, str(tmp_path))
    with _measured(RunDirectory.create(tmp_path / "new", "[data.silos]\n")):
        pass
    assert not list(tmp_path.glob("*.prom*"))
    monkeypatch.setenv(METRICS, str(tmp_path / "missing"))
    with _measured(run) as observer:
        observer.round({})
    assert "cannot be written" in caplog.text


def test_dashboard_and_alerts_name_metrics_that_exist(
    measured: Worker, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS, str(tmp_path / "metrics"))
    with _measured(run):
        pass
    serving, counters = Metrics(), SimpleNamespace(steps=0, rows=0, prefills=0)
    serving.show(SimpleNamespace(counters=counters, queue_length=0, running=0))  # type: ignore[arg-type]
    texts = [path.read_text() for path in (tmp_path / "metrics").iterdir()] + [serving.text().decode()]
    known = {word for text in texts for word in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)}
    for name in ("grafana-dashboard.json", "prometheus-alerts.yaml"):
        named = set(re.findall(r"\bflexperts_\w+", (DEPLOY / name).read_text()))
        assert len(named) >= 4
        for one in named:
            assert {one, one.removesuffix("_sum"), one.removesuffix("_count"), one.removesuffix("_bucket")} & known
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
