"""Runs killed with SIGKILL, resumed, and killed again end bit for bit as undisturbed ones do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from siege import left_behind

from flexperts.config.run import RunConfig

pytestmark = pytest.mark.faults

KILLS = 12
Recipe = Callable[..., RunConfig]
SHORT = (
    "lora.dropout=0.1",
    "federation.rounds=3",
    "evaluation.max_new_tokens=2",
    "evaluation.rows=2",
    "evaluation.every=1",
)
SIEGE = Path(__file__).with_name("siege.py")
SCENARIOS = {
    "flex": ("method.name=flex", "federation.participation=0.5"),
    "fedadam": ("method.name=fedadam", "federation.participation=0.75", "compression.kind=top_k"),
    "scaffold": (
        "method.name=scaffold",
        "federation.participation=0.5",
        "training.optimizer=sgd",
        "training.lr=0.5",
    ),
    "fedsa_lora": ("method.name=fedsa_lora", "federation.participation=0.5"),
    "everything": (
        "method.reference=fedavg",
        "federation.participation=0.5",
        "federation.rounds=2",
        "evaluation.routing_rows=2",
        "evaluation.others_rows=1",
    ),
}
"""Personal states, server-side moments with error feedback, client-side memory, personal halves; and a reference
run with what is measured beyond the rounds."""

assert KILLS * len(SCENARIOS) >= 50


def written(config: RunConfig, folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(config.to_toml())
    return path


def besieged(config: RunConfig, folder: Path, seed: int) -> dict[str, Any]:
    recipe = written(config, folder)
    command = [sys.executable, "-W", "ignore", str(SIEGE), str(recipe), str(folder), str(KILLS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_runs_end_as_undisturbed_ones(recipe: Recipe, tmp_path: Path, name: str) -> None:
    seed = sorted(SCENARIOS).index(name)
    report = besieged(recipe(*SHORT, *SCENARIOS[name]), tmp_path, seed)
    print(f"{name}: {len(report['killed'])} kills in {report['runs']} runs, {sorted(set(report['killed']))}")
    assert report["differ"] == []
    assert len(report["killed"]) >= KILLS
    assert {"amid the bytes of a file", "before a rename", "a training step"} <= report["places"].keys()
    assert {"checkpoint.safetensors", "personal/shop.safetensors", "summary.json"} <= set(report["files"])


def started(recipe: Path, out: Path) -> subprocess.Popen[str]:
    code = "from flexperts.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", str(recipe), "--out", str(out), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "signs",
    [
        ("config.toml", "personal/shop.safetensors", "predictions/clinic.jsonl"),
        ("selection/help_desk.json", "rounds.jsonl", "personal/before/clinic.safetensors"),
    ],
)
def test_the_command_is_killed_from_outside(recipe: Recipe, tmp_path: Path, signs: tuple[str, ...]) -> None:
    """Whole processes, killed as soon as a file appears, whatever they are doing by then."""
    path, out = written(recipe(*SHORT), tmp_path), tmp_path / "out"
    for sign in signs:
        process = started(path, out)
        while not (out / sign).exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    for folder in (out, tmp_path / "straight"):
        process = started(path, folder)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert left_behind(out) == left_behind(tmp_path / "straight")
