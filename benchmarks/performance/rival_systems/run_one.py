"""Run one system in this process and write its cost.

python benchmarks/performance/rival_systems/run_one.py SYSTEM FOLDER CLIENTS ROUNDS OUT
"""

from __future__ import annotations

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

import importlib
import json
import sys
import time
from pathlib import Path

import psutil
from clock import Clock, cpu_seconds
from safetensors.torch import save_file
from work import Work

SYSTEMS = {
    "bare": ("bare_loop", "fedavg", 1),
    "fedavg": ("flexperts_rounds", "fedavg", 1),
    "flex": ("flexperts_rounds", "flex", 1),
    "fedavg2": ("flexperts_rounds", "fedavg", "auto"),
    "flex2": ("flexperts_rounds", "flex", "auto"),
    "openfedllm": ("openfedllm", "fedavg", 1),
    "flowertune": ("flowertune", "fedavg", 1),
    "ray": ("flower_ray", "fedavg", 1),
}
"""Name -> module here with a function ``run``, flexperts' method, and its workers."""


def main(system: str, folder: str, clients: str, rounds: str, out: str) -> None:
    """Run it; the adapter goes to ``OUT.safetensors``, the costs to ``OUT.json``."""
    module, method, workers = SYSTEMS[system]
    clock, work = Clock(), Work(Path(folder), int(clients), int(rounds), method, workers)
    adapter = importlib.import_module(module).run(work, clock)
    save_file({name.replace(".default.", "."): t.contiguous() for name, t in adapter.items()}, f"{out}.safetensors")
    told = {
        "started": psutil.Process().create_time(),
        "rounds": clock.rounds,
        "cpu": cpu_seconds(),
        "ended": time.time(),
    }
    Path(f"{out}.json").write_text(json.dumps(told | {"steps": clock.steps, "tokens": clock.tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
