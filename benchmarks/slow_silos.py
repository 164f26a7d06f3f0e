"""Time to a loss with silos of different speeds: synchronous, buffered, local work by time; and the page.

    python benchmarks/slow_silos.py --out runs/slow-silos --seeds 5     # resumable; finished runs are not run again
    python benchmarks/slow_silos.py --page                            # docs/slow-silos.md from the JSON

Two of the quick start's silos take a second for a step, two take four. Every entry is planned for the same
simulated time, and its learning rate's cosine is over that time. Writes benchmarks/results/slow_silos.json and the
page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.environment import environment
from flexperts.files import write_json
from flexperts.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.toml"
RESULTS = ROOT / "benchmarks" / "results" / "slow_silos.json"
PAGE, TEMPLATE = ROOT / "docs" / "slow-silos.md", Path(__file__).with_name("slow_silos.template.md")
STEPS, ROUNDS, SLOW = 4, 8, 4
"""Steps of a turn, synchronous rounds, and how many times longer a slow silo's step takes."""
SETTINGS = (
    "method.name=fedavg",
    "method.reference=",
    f"training.local_steps={STEPS}",
    f"federation.step_seconds={{law_firm = {SLOW}.0, shop = {SLOW}.0}}",
    "evaluation.max_new_tokens=1",
    "evaluation.rows=10",
    "evaluation.answers=last",
)
ENTRIES = {
    "synchronous": (f"federation.rounds={ROUNDS}", "evaluation.every=1"),
    "buffered, 2 of 4": (
        "federation.mode=buffered",
        "federation.buffer=2",
        f"federation.rounds={ROUNDS * SLOW}",
        f"evaluation.every={SLOW}",
    ),
    "synchronous, local_seconds": (
        f"training.local_seconds={STEPS}",
        f"federation.rounds={ROUNDS * SLOW}",
        f"evaluation.every={SLOW}",
    ),
}


_HEAVY = ("personal", "shared", "copies", "checkpoint.safetensors", "predictions")


def run_entry(folder: Path, settings: tuple[str, ...], workspace: Workspace | None) -> Workspace:
    """Run the recipe with settings, keep the run's small files, and return the workspace for the next one."""
    config = load_recipe(RECIPE, settings)
    workspace = workspace or Workspace(config)
    run_federation(config, folder, resume=True, workspace=workspace)
    for path in (folder / name for name in _HEAVY):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return workspace


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Return the run directory of an entry with a seed."""
    return out / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}"


def losses(folder: Path) -> list[tuple[float, float]]:
    """Return simulated seconds and the global model's NLL, a mean over silos, after every evaluation of a run."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (log["clock"], fmean(its["nll.global"] for its in log["scores"].values()))
        for log in rounds
        if log["scores"]
    ]


def seconds_to(target: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Return when a curve first has a loss, on lines between its points; None if it never has."""
    for (since, high), (until, low) in pairwise(curve):
        if low <= target < high:
            return since + (until - since) * (high - target) / (high - low)
    return curve[0][0] if curve[0][1] <= target else None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half of its 95 % interval by Student's t; 0 with one seed."""
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return fmean(values), half


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]] = found["curves"]
    reference = curves["synchronous"]
    lines = [
        "| rounds | evaluated after | NLL then | time to the synchronous run's last loss, of its time |",
        "|---|---:|---:|---:|",
    ]
    for name, runs in curves.items():
        last, spread = mean_and_interval([run[-1][1] for run in runs])
        whole = [run[-1][0] for run in reference]
        times = [seconds_to(ref[-1][1], run) for ref, run in zip(reference, runs, strict=True)]
        reached = [time / end for time, end in zip(times, whole, strict=True) if time is not None]
        ratio = (
            "{:.2f} ± {:.2f}".format(*mean_and_interval(reached))
            if len(reached) == len(runs)
            else (f"reached with {len(reached)} of {len(runs)} seeds")
        )
        lines.append(f"| {name} | {runs[0][-1][0]:.0f} s | {last:.3f} ± {spread:.3f} | {ratio} |")
    return TEMPLATE.read_text(encoding="utf-8").format(
        table="\n".join(lines),
        seeds=len(reference),
        commit=found["commit"],
        date=found["date"],
        cores=found["environment"]["cores"],
        processor=found["environment"]["processor"],
    )


def main() -> None:
    """Run what is not finished, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="only write the page from the JSON")
    given = parser.parse_args()
    if not given.page:
        if given.out is None:
            parser.error("--out is needed")
        for seed in range(given.seeds):
            workspace: Workspace | None = None
            for name, settings in ENTRIES.items():
                folder = folder_of(given.out, name, seed)
                workspace = run_entry(folder, (*SETTINGS, f"seed={seed}", *settings), workspace)
                print(f"{name}, seed {seed}: NLL {losses(folder)[-1][1]:.3f}", flush=True)
        seeds = range(given.seeds)
        curves = {name: [losses(folder_of(given.out, name, seed)) for seed in seeds] for name in ENTRIES}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        facts = {"commit": commit.stdout.strip(), "date": date.today().isoformat(), "environment": environment()}
        write_json(RESULTS, facts | {"curves": curves})
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
