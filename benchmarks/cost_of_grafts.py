"""Measured cost of K + 1 experts: step, prefill, decode, memory and FLOPs of variants on one base, as a table.

    python benchmarks/cost_of_grafts.py --out runs/costs                       # the quick start's base
    python benchmarks/cost_of_grafts.py --base allenai/OLMoE-1B-7B-0924 --rows 8 --prompt 512 --out runs/costs-olmoe
    python benchmarks/cost_of_grafts.py --only "fedavg (attention LoRA)" "flex, k = 1"

Variants take turns; results are medians, with ratios to attention LoRA + FedAvg. Next to the counted FLOPs are
those of `flexperts plan`, which do not include attention over the context.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flexperts.costs.speed import REFERENCE, VARIANTS, Speed, Workload, measure
from flexperts.environment import environment
from flexperts.files import write_json
from flexperts.modeling.load import load_base
from flexperts.recipe import parse_recipe


def table(speeds: list[Speed]) -> str:
    """Return a Markdown table: medians, and in brackets their ratio to the reference's."""
    reference = next((s for s in speeds if s.name == REFERENCE), speeds[0])
    head = ("variant", "trained", "step, s", "prefill, s", "decode, s/token", "peak memory, GB", "GFLOPs/token")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for speed in speeds:
        cells = [
            _cell(getattr(speed, field), getattr(reference, field), scale)
            for field, scale in (
                ("step", 1),
                ("prefill", 1),
                ("decode", 1),
                ("peak_memory", 1e-9),
                ("flops_per_token", 1e-9),
            )
        ]
        lines.append("| " + " | ".join([speed.name, f"{speed.trained:,}", *cells]) + " |")
    return "\n".join(lines)


def _cell(value: float | None, reference: float | None, scale: float) -> str:
    if value is None:
        return "-"
    ratio = f" ({value / reference:.2f})" if reference else ""
    return f"{scale * value:.4g}{ratio}"


def main() -> None:
    """Measure and print; with ``--out``, write costs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smol-moe")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    for name, value in asdict(Workload()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args()
    workload = replace(Workload(), **{name: getattr(given, name) for name in asdict(Workload())})
    config = parse_recipe("data.silos = {}", [*given.settings, f"model.base={given.base!r}"])
    base = load_base(config.model)
    chosen = {name: VARIANTS[name] for name in given.only}
    speeds = measure(base, workload, chosen, given.settings, lambda line: print(line, file=sys.stderr))
    print(table(speeds))
    if given.out:
        found: dict[str, Any] = {"base": given.base, "workload": asdict(workload), "environment": environment()}
        write_json(given.out / "costs.json", {**found, "variants": [asdict(speed) for speed in speeds]})


if __name__ == "__main__":
    main()
