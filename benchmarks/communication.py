"""Bytes against quality: FedAvg on the quick start's silos with each packing of both directions, and its page.

    python benchmarks/communication.py --out runs/communication --seeds 3          # the study, resumable
    python benchmarks/communication.py --out runs/communication --only fp32 "half of the signs" --rounds 3
    python benchmarks/communication.py --page                                 # docs/communication.md from the JSON

Writes benchmarks/results/communication.json, or with --results another file, and with it the page. Bytes and wall
time of ten rounds are planned, which agrees with a run's ledger to one percent; scores are measured. All entries of
a seed share base, rows, batches and rounds; ``entries`` lists the differences. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from entries import folder_of, run_entry

from flexperts.client.workspace import Workspace
from flexperts.costs.models import describe, meta_base
from flexperts.costs.plan import model_facts, plan_method
from flexperts.environment import environment
from flexperts.files import write_json
from flexperts.recipe import load_recipe
from flexperts.smol_moe.build import resolve_base

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.toml"
RESULTS = ROOT / "benchmarks" / "results" / "communication.json"
PAGE, TEMPLATE = ROOT / "docs" / "communication.md", Path(__file__).with_name("communication.template.md")
ROUNDS = 10
"""Rounds of the planned bytes and times."""
CLIENTS = 4
LINKS = {"10 Mbit/s": 10.0, "1 Gbit/s": 1000.0}


def entries(rounds: int) -> dict[str, tuple[str, ...]]:
    """Return the settings of each entry."""
    kinds = {
        "fp32": ("none", "none", ()),
        "int8": ("int8", "int8", ()),
        "int4": ("int4", "int4", ()),
        "signs": ("top_k_sign", "int4", ("compression.fraction=1.0",)),
        "half of the signs": ("top_k_sign", "int4", ("compression.fraction=0.5",)),
        "half of the signs, decay 0.95": (
            "top_k_sign",
            "int4",
            ("compression.fraction=0.5", "compression.feedback_decay=0.95"),
        ),
        "largest 20 % in int4": ("top_k_int4", "int4", ("compression.fraction=0.2",)),
        "largest 5 % in int4": ("top_k_int4", "int4", ("compression.fraction=0.05",)),
        "A alone (fedsa_lora), int4": ("int4", "int4", ("method.name=fedsa_lora",)),
        "half of the rounds, twice as long, half of the signs": (
            "top_k_sign",
            "int4",
            ("compression.fraction=0.5", f"federation.rounds={max(1, rounds // 2)}", "training.local_epochs=2"),
        ),
    }
    return {
        name: ("method.name=fedavg", f"compression.kind={up}", f"compression.downlink={down}", *more)
        for name, (up, down, more) in kinds.items()
    }


def planned(model: str) -> dict[str, dict[str, Any]]:
    """Return bytes and times of ten rounds of every entry on four clients."""
    description = describe(resolve_base(model))
    made: dict[str, dict[str, Any]] = {}
    for name, own in entries(ROUNDS).items():
        config = load_recipe(RECIPE, (f"federation.rounds={ROUNDS}", *own))
        base = meta_base(description, config.model.dtype)
        facts = model_facts(description, base)
        plan = plan_method(base, facts, config, [f"client-{number}" for number in range(CLIENTS)], bandwidth=1.0)
        made[name] = {
            "up": plan.run_up / CLIENTS,
            "down": plan.run_down / CLIENTS,
            "seconds": {link: plan.run_seconds / rate for link, rate in LINKS.items()},
        }
    return made


def measured(out: Path, names: list[str]) -> list[dict[str, Any]]:
    """Return one record per finished entry and seed: scores and bytes of all messages."""
    found = []
    for name in names:
        for folder in sorted(folder_of(out, name, 0).parent.glob("seed-*")):
            if (folder / "summary.json").exists():
                summary = json.loads((folder / "summary.json").read_text())
                kept = {key: summary[key] for key in ("method", "seed", "rounds", "mean", "bytes")}
                found.append({"entry": name} | kept)
    return found


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        rounds=ROUNDS,
        planned=_planned_table(found["planned"]),
        measured=_measured(found),
        commit=found["commit"],
        date=found["date"],
        cores=found["environment"]["cores"],
        processor=found["environment"]["processor"],
    )


def _planned_table(plans: Mapping[str, Any]) -> str:
    whole = plans["fp32"]
    lines = [
        f"| packing up, down | MB up | of fp32 | MB down | of fp32 | {' | '.join(LINKS)} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, plan in plans.items():
        up, down = (f"{plan[way] / 1e6:.2f} | 1/{whole[way] / plan[way]:.1f}" for way in ("up", "down"))
        seconds = " | ".join(f"{plan['seconds'][link]:.2f} s" for link in LINKS)
        lines.append(f"| {name} | {up} | {down} | {seconds} |")
    return "\n".join(lines)


def _measured(found: Mapping[str, Any]) -> str:
    records = found["measured"]
    if not records:
        return "No run is on record yet."
    command = f"python benchmarks/communication.py --out runs/communication {found['runs']}"
    lines = [
        f"FedAvg on the quick start's silos: `{command}`.",
        "",
        "| packing | seeds | kB up, a client and round | kB down | NLL zero-shot | NLL global | ROUGE-L global |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(record["entry"] for record in records):
        some = [record for record in records if record["entry"] == name]
        ways = [f"{way}_per_client_per_round" for way in ("uplink", "downlink")]
        sizes = [fmean(record["bytes"][way] for record in some) / 1e3 for way in ways]
        wanted = (("nll", "zero_shot"), ("nll", "global"), ("rouge_l", "global"))
        scores = [fmean(record["mean"][kind][state] for record in some) for kind, state in wanted]
        cells = [f"{sizes[0]:.1f}", f"{sizes[1]:.1f}", f"{scores[0]:.3f}", f"{scores[1]:.3f}", f"{scores[2]:.1f}"]
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not finished, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", metavar="ENTRY")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--model", default="smol-moe", help="Base of the planned bytes.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="only write the page from the JSON")
    given = parser.parse_args()
    if not given.page:
        if given.out is None:
            parser.error("--out is needed")
        every = entries(given.rounds)
        for seed in range(given.seeds):
            workspace: Workspace | None = None
            for name in given.only or every:
                settings = (*given.settings, f"federation.rounds={given.rounds}", f"seed={seed}", *every[name])
                workspace = run_entry(RECIPE, folder_of(given.out, name, seed), settings, workspace)
                print(f"{name}, seed {seed}", flush=True)
        words = [f"--rounds {given.rounds}", f"--seeds {given.seeds}"]
        words += [f"--set {' '.join(given.settings)}"] if given.settings else []
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        found = {
            "commit": commit.stdout.strip(),
            "date": date.today().isoformat(),
            "environment": environment(),
            "runs": " ".join(words),
            "planned": planned(given.model),
            "measured": measured(given.out, list(every)),
        }
        write_json(given.results, found)
    if given.page or given.results == RESULTS:
        PAGE.write_text(page(json.loads(given.results.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
