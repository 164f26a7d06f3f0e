"""What packing the uplink saves and what it costs in scores: one recipe, every kind of packing, some seeds.

    python benchmarks/compression.py --out runs/compression                    # the quick start's silos, resumable
    python benchmarks/compression.py --out runs/compression --seeds 3
    python benchmarks/compression.py --out runs/compression --table            # print what is there
    python benchmarks/compression.py --out runs/tiny --set model.base=DIR evaluation.rows=2 --rounds 1

Writes compression.json: settings, mean scores and bytes of each entry and seed. All entries of a seed share base,
rows, batches and rounds; ``ENTRIES`` lists the differences. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from entries import folder_of, run_entry

from flexperts.client.workspace import Workspace
from flexperts.environment import environment
from flexperts.files import write_json

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"

ENTRIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "fp16": ("compression.kind=fp16",),
    "int8": ("compression.kind=int8",),
    "int8, no feedback": ("compression.kind=int8", "compression.error_feedback=false"),
    "top_k 5 %": ("compression.kind=top_k",),
    "top_k 5 %, no feedback": ("compression.kind=top_k", "compression.error_feedback=false"),
    "top_k 1 %": ("compression.kind=top_k", "compression.fraction=0.01"),
}


def results(out: Path) -> list[dict[str, Any]]:
    """Return one record per finished entry and seed, in the order of ``ENTRIES``."""
    found = []
    for name in ENTRIES:
        for folder in sorted(folder_of(out, name, 0).parent.glob("seed-*")):
            if (folder / "summary.json").exists():
                summary = json.loads((folder / "summary.json").read_text())
                kept = {key: summary[key] for key in ("method", "seed", "rounds", "mean", "bytes")}
                found.append({"entry": name, "settings": ENTRIES[name]} | kept)
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table: means over seeds, bytes and their share of the unpacked ones."""
    lines = [
        "| packing | kB up per client and round | of unpacked | ROUGE-L global | personalized | NLL global "
        "| personalized |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_entry = {
        n: [r for r in records if r["entry"] == n] for n in ENTRIES if any(r["entry"] == n for r in records)
    }
    sizes = {n: mean(r["bytes"]["uplink_per_client_per_round"] for r in some) for n, some in by_entry.items()}
    for name, some in by_entry.items():
        share = f"{sizes[name] / sizes['none']:.1%}" if "none" in sizes else "–"
        scores = [_mean(some, kind, state) for kind in ("rouge_l", "nll") for state in ("global", "personalized")]
        lines.append("| " + " | ".join([name, f"{sizes[name] / 1e3:.1f}", share, *scores]) + " |")
    return "\n".join(lines)


def _mean(records: list[dict[str, Any]], kind: str, state: str) -> str:
    values = [r["mean"][kind][state] for r in records]
    return "–" if None in values else f"{mean(values):.2f}"


def main() -> None:
    """Run what is not finished, write compression.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--only", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), metavar="ENTRY")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--table", action="store_true", help="only print the table of what is finished")
    arguments = parser.parse_args()
    rounds = () if arguments.rounds is None else (f"federation.rounds={arguments.rounds}",)
    for seed in range(0 if arguments.table else arguments.seeds):
        workspace: Workspace | None = None
        for name in arguments.only:
            settings = (*arguments.settings, *rounds, f"seed={seed}", *ENTRIES[name])
            workspace = run_entry(arguments.recipe, folder_of(arguments.out, name, seed), settings, workspace)
            print(f"{name}, seed {seed}", flush=True)
    records = results(arguments.out)
    write_json(arguments.out / "compression.json", {"environment": environment(), "entries": records})
    print(table(records))


if __name__ == "__main__":
    main()
