"""Start-up time of flexperts: its command, its import, a base from the cache; each in fresh processes.

    python benchmarks/performance/start_up.py

Processes of all kinds take turns; files are in the page cache after the first turn, which is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from figures import Benchmark, Figure, parser

from flexperts.smol_moe.build import build_base

BASE = "smol-moe"
HEAVY = ("torch", "transformers", "peft", "flwr", "numpy")
LIGHT = (
    "FlexpertsError",
    "Observer",
    "RunConfig",
    "RunDirectory",
    "build_base",
    "load_recipe",
    "method_names",
    "parse_recipe",
    "register_method",
)
"""Public names that have nothing to do with tensors."""
TURNS = 11
BASE_TURNS = 5

_IMPORTS = f"""
import json, sys, time
start = time.perf_counter()
import flexperts
package = time.perf_counter() - start
from flexperts import {", ".join(LIGHT)}
print(json.dumps({{
    "package": package,
    "light names": time.perf_counter() - start,
    "heavy": sorted({set(HEAVY)} & set(sys.modules)),
}}))
"""
_LOADS = f"""
import json, time
marks = [time.perf_counter()]
mark = lambda: marks.append(time.perf_counter())
import torch; mark()
import transformers; from transformers import AutoConfig, AutoTokenizer; mark()
from flexperts.config.model import ModelConfig; from flexperts.modeling.load import load_base; mark()
load_base(ModelConfig(base="{BASE}")); mark()
names = ("import torch", "import transformers", "import flexperts.modeling.load", "load_base")
print(json.dumps(dict(zip(names, (b - a for a, b in zip(marks, marks[1:])), strict=True))))
"""


def timed(command: list[str]) -> tuple[float, str]:
    """Run a process; return its wall time in seconds, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def light_turn() -> dict[str, float]:
    """Time the command and the imports once."""
    python = sys.executable
    bare, _ = timed([python, "-c", "pass"])
    command, _ = timed([str(Path(python).with_name("flexperts")), "--help"])
    _, printed = timed([python, "-c", _IMPORTS])
    told: dict[str, Any] = json.loads(printed)
    if heavy := told.pop("heavy"):
        raise SystemExit(f"importing {', '.join(LIGHT)} also imports {', '.join(heavy)}")
    return {"python alone": bare, "flexperts --help": command, **told}


def base_turn() -> dict[str, float]:
    """Time one process that loads the base, and its parts."""
    whole, printed = timed([sys.executable, "-c", _LOADS])
    return {"whole process": whole, **json.loads(printed)}


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of every time, but for the first turn's."""
    return {name: median(turn[name] for turn in turns[1:]) for name in turns[0]}


def figures(light: dict[str, float], base: dict[str, float]) -> list[Figure]:
    """Return the figures, from medians in seconds."""
    return [
        Figure(
            "`flexperts --help`, whole process",
            light["flexperts --help"],
            "s",
            at_most=0.3,
            limit=f"Typer and rich, which print it; Python alone takes {light['python alone']:.3f} s.",
        ),
        Figure(
            "`import flexperts`, without torch",
            light["package"],
            "s",
            at_most=0.1,
            limit="Python's own typing: every public name is imported when it is first used.",
        ),
        Figure(
            f"{len(LIGHT)} public names that need no tensors (recipes, run directory, methods), without torch",
            light["light names"],
            "s",
            limit="Importing pydantic, and building the recipe's classes with it.",
        ),
        Figure(
            f"`{BASE}` ready from cache, torch and transformers imported",
            base["import flexperts.modeling.load"] + base["load_base"],
            "s",
            at_most=3,
            limit="The model's class is imported on first use, and with it parts of torch (dynamo, distributed).",
        ),
        Figure(
            f"`{BASE}` ready from cache, from the start of the process to its end",
            base["whole process"],
            "s",
            limit=f"Importing torch ({base['import torch']:.2f} s) and transformers "
            f"({base['import transformers']:.2f} s), none of it flexperts' own code.",
        ),
    ]


def main() -> None:
    """Time everything, and write start_up.json."""
    given = parser(__doc__).parse_args()
    benchmark = Benchmark(
        "start_up",
        "Start-up",
        f"Fresh processes, medians of {TURNS} ({BASE_TURNS} where a base is loaded), files in the page cache.",
    )
    build_base(BASE)
    light, base = [], []
    for turn in range(TURNS + 1):
        light.append(light_turn())
        if turn <= BASE_TURNS:
            base.append(base_turn())
        print(f"turn {turn} of {TURNS}", flush=True)
    details = {"light": light, "base": base, "not counted": "the first turn of each"}
    benchmark.write(given.out, figures(medians(light), medians(base)), details)


if __name__ == "__main__":
    main()
