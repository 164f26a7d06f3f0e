"""One table of all methods and of FLEx's variants on one recipe: same base, silos, seed, rounds and steps.

    python benchmarks/methods_table.py --out runs/methods                      # everything, resumable
    python benchmarks/methods_table.py --out runs/methods --only fedavg flex   # some
    python benchmarks/methods_table.py --out runs/methods --workers 4          # side by side, on one GPU
    python benchmarks/methods_table.py --out runs/methods --table              # print what is there

Every entry is the quick start's recipe with another method; ``ENTRIES`` lists its other changes. Nothing
else was tuned for a method. Finished entries are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.engines.run import run_federation
from flexperts.environment import environment
from flexperts.files import write_json
from flexperts.methods.registry import method_names
from flexperts.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
RANKS = "{clinic = 2, help_desk = 4, law_firm = 8, shop = 8}"

SETTINGS: dict[str, tuple[str, ...]] = {
    # Of the quick start's three rounds.
    "fedlease": ("method.options={warmup_rounds=1}",),
    # Plain SGD needs another step than AdamW; gradients are clipped to norm 1.
    "scaffold": ("training.optimizer=sgd", "training.lr=0.5"),
    "flora": (f"method.options={{ranks = {RANKS}}}",),
    "flexlora": (f"method.options={{ranks = {RANKS}}}",),
    "hetlora": (f"method.options={{ranks = {RANKS}}}",),
}
"""Settings that a method needs besides its name."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "fedavg, SGD as scaffold": ("method.name=fedavg", "training.optimizer=sgd", "training.lr=0.5"),
    "fedavg, lr 6e-3": ("method.name=fedavg", "training.lr=6e-3"),
    "flex, k = 2": ("graft.experts=2",),
    "flex, k = 4": ("graft.experts=4",),
    "flex, k = 2 greedy": ("graft.experts=2", "graft.selection=greedy"),
    "flex, k = 2 greedy, least-squares start": (
        "graft.experts=2",
        "graft.selection=greedy",
        "graft.scale=least_squares",
    ),
    "flex, scaled reconstruction": ("graft.selection=scaled",),
    "flex, activation frequency": ("graft.selection=frequency",),
    "flex, router weight": ("graft.selection=router_weight",),
    "flex, random expert": ("graft.selection=random",),
    "flex, graft LoRA r = 8": ("graft.rank=8",),
    "flex, in place": ("graft.place=in_place",),
    "flex, in place, LoRA r = 8": ("graft.place=in_place", "graft.rank=8"),
    "flex, shared graft": ("graft.sharing=shared",),
    "flex, shared and personal graft": ("graft.sharing=both",),
    "flex, gate bias -2": ("graft.gate_bias=-2.0",),
    "flex, gate bias +2": ("graft.gate_bias=2.0",),
    "flex, scale 0.5": ("graft.scale=0.5",),
    "flex, scale 2": ("graft.scale=2.0",),
    "flex, lower half of layers": ("graft.layers=[0, 1, 2]",),
    "flex, upper half of layers": ("graft.layers=[3, 4, 5]",),
    "flex, dropout 0.25": ("graft.dropout=0.25",),
    "flex, dropout 0.5": ("graft.dropout=0.5",),
    "flex, alternating": ('method.options={phases="alternating"}',),
    "flex, pull 0.1": ("method.options={pull=0.1}",),
    "flex, pull 1": ("method.options={pull=1.0}",),
}

ENTRIES = {name: (f"method.name={name}", *SETTINGS.get(name, ())) for name in method_names()} | VARIANTS

_workspace: Workspace | None = None


def run_entry(name: str, out: Path, extra: tuple[str, ...]) -> str:
    """Run one entry in its own folder and keep its small files; return its name, or the failure."""
    global _workspace
    folder = out / name.replace(" ", "_")
    config = load_recipe(RECIPE, (*extra, *ENTRIES[name]))
    config = config.model_copy(update={"method": config.method.model_copy(update={"reference": None})})
    _workspace = _workspace or Workspace(config)
    try:
        run_federation(config, folder, resume=True, workspace=_workspace)
    except Exception:  # one failed entry must not stop the others
        (out / f"{folder.name}.error").write_text(traceback.format_exc())
        return f"{name}: FAILED, see {folder.name}.error"
    for heavy in ("personal", "shared", "checkpoint.safetensors", "predictions"):
        path = folder / heavy
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return name


def results(out: Path) -> list[dict[str, Any]]:
    """Return one record per finished entry, in the order of ``ENTRIES``."""
    found = []
    for name in ENTRIES:
        path = out / name.replace(" ", "_") / "summary.json"
        if path.exists():
            summary = json.loads(path.read_text())
            kept = ("method", "seed", "rounds", "mean", "bytes", "seconds", "clients")
            found.append({"entry": name, "settings": ENTRIES[name][1:]} | {key: summary[key] for key in kept})
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| entry | ROUGE-L global | personalized | NLL global | personalized | MB up | MB down | training s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        means, sizes = _one_model(r["mean"]), r["bytes"]
        scores = [_number(means[kind][s]) for kind in ("rouge_l", "nll") for s in ("global", "personalized")]
        moved = [f"{sizes[f'{d}_per_client_per_round'] / 1e6:.2f}" for d in ("uplink", "downlink")]
        lines.append("| " + " | ".join([r["entry"], *scores, *moved, f"{r['seconds']['training']:.0f}"]) + " |")
    return "\n".join(lines)


def _one_model(means: dict[str, Any]) -> dict[str, Any]:
    """Return the means; where nothing is trained, the untouched base is the one model for all."""
    untrained = all(means["nll"][state] is None for state in ("global", "personalized"))
    return {k: v | {"global": v["zero_shot"]} for k, v in means.items()} if untrained else means


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Run what is not finished, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), metavar="ENTRY")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--table", action="store_true", help="only print the table of what is finished")
    arguments = parser.parse_args()
    if not arguments.table:
        arguments.out.mkdir(parents=True, exist_ok=True)
        # CUDA cannot be used in a forked process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            jobs = [pool.submit(run_entry, n, arguments.out, tuple(arguments.settings)) for n in arguments.only]
            for job in jobs:
                print(job.result(), flush=True)
        write_json(
            arguments.out / "results.json", {"environment": environment(), "entries": results(arguments.out)}
        )
    print(table(results(arguments.out)))


if __name__ == "__main__":
    main()
