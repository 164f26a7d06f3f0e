"""flexperts compared with the usual ways to simulate federated fine-tuning, on the same work.

    python benchmarks/performance/rivals.py            # about fourteen minutes on two idle cores

Every system is one file of ``rival_systems`` and runs in a separate process, one at a time, first with 4
clients, then with 20. All train the same rows of the same clients in the same batches, with LoRA of rank 8 on q, k
and v of `smol-moe`, AdamW, bf16 and an average by rows; steps and tokens are counted, and the averaged adapters are
scored on rows that nobody trained on. The bare loop does the same steps without any federation.

Ray is not a dependency and is not in the environment; `make bench` installs it, or by hand:

    pip install --constraint constraints.txt --target build/ray ray==2.55.1
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from figures import ROOT, Benchmark, Figure, parser
from rival_systems.launch import run_system

from flexperts.data.silos.generate import SILOS, write_silos

ROUNDS = {4: 4, 20: 3}
"""Clients -> rounds; the first round is reported separately."""
SYSTEMS = {
    "bare": "bare loop",
    "fedavg": "flexperts, fedavg",
    "flex": "flexperts, flex",
    "fedavg2": "flexperts, fedavg, a worker per core",
    "flex2": "flexperts, flex, a worker per core",
    "openfedllm": "a trainer per client and round, as OpenFedLLM",
    "flowertune": "a base per message, as FlowerTune",
    "ray": "Flower's Ray simulation of flexperts' apps",
}
RIVALS = ("openfedllm", "flowertune", "ray")
LIMITS = {
    "fedavg": "the steps themselves; the rest is messages, checks and files",
    "flex": "the personal experts' share of every step, and their state on disk",
    "fedavg2": "the steps, with one thread each; both cores share the memory's bandwidth",
    "flex2": "the steps, with one thread each; both cores share the memory's bandwidth",
    "openfedllm": "the trainer's step computes logits of prompts too; building it and its loader takes the rest",
    "flowertune": "base and tokenizer are loaded for every message, on top of a trainer per client",
    "ray": "the steps; one worker per core with one thread each, and every worker holds a base",
}
TOLERANCE = 0.05
"""Largest difference of a rival's held-out loss from ours, as a share of the gain by training."""
NOTES = (
    "The rivals are written from their public description, in a few dozen lines each; each file of "
    "`benchmarks/performance/rival_systems` says at its top what is fair and what is not.",
    "A client takes two short steps a round here, so that 20 clients fit a CPU. What loading, building, sending "
    "and averaging cost does not grow with the steps, so their share shrinks with more of them; the higher "
    "cost of a Trainer's own step remains.",
    "The first round is counted from the start of the process, imports and loading of the base included. Memory is "
    "the most that all processes of a system held at once, pages that they share counted once.",
)
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """The cost of a system with some clients.

    Args:
        first: Seconds from the start of the process to the end of round 1.
        wall, cpu: Medians over the later rounds, in seconds.
        memory: The most that its processes held at once, in GiB.
    """

    first: float
    wall: float
    cpu: float
    memory: float

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Cost:
        """Read it from a run's report."""
        first, *later = told["rounds"]
        return cls(
            first["ended"] - told["started"],
            statistics.median(one["ended"] - one["began"] for one in later),
            statistics.median(one["cpu"] for one in later),
            told["memory"] / GIB,
        )


Costs = Mapping[int, Mapping[str, Cost]]


def main() -> None:
    """Run every system with every number of clients, and write the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--ray", type=Path, default=ROOT / "build" / "ray", help="folder that holds Ray")
    arguments.add_argument("--clients", type=int, choices=ROUNDS, nargs="+", default=[*ROUNDS])
    given = arguments.parse_args()
    if not (given.ray / "ray").is_dir():
        sys.exit(f"{given.ray}: Ray is not installed there; --help says how to install it")
    benchmark = Benchmark(
        "rivals",
        "Rivals on the same work",
        "Rounds of FedAvg on `smol-moe`: every client takes two steps of two rows, with LoRA on q, k and v. Ratios "
        "are over a bare training loop that does the same steps with no federation at all.",
    )
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(max(ROUNDS) // len(SILOS)):
            write_silos(Path(folder) / "silos" / str(seed), seed, train_rows=16, test_rows=4)
        runs = {clients: run_all(Path(folder), clients, given.ray) for clients in given.clients}
        losses = {clients: judged(Path(folder), clients) for clients in runs}
    costs = {clients: {name: Cost.of(told) for name, told in found.items()} for clients, found in runs.items()}
    benchmark.notes = [table(costs), alike(losses), *NOTES]
    told = {n: {name: asdict(cost) for name, cost in found.items()} for n, found in costs.items()}
    benchmark.write(given.out, list(figures(costs)), {"costs": told, "runs": runs, "held out": losses})


def run_all(folder: Path, clients: int, ray: Path) -> dict[str, dict[str, Any]]:
    """Run all systems; return their reports.

    Steps and tokens must be the same everywhere, or nothing is compared.
    """
    runs = {}
    for name, title in SYSTEMS.items():
        told = run_system(name, folder, clients, ROUNDS[clients], folder / f"{name}-{clients}", ray)
        cost = Cost.of(told)
        print(f"{clients} clients, {title}: {cost.wall:.1f} s a round, {cost.memory:.2f} GiB", flush=True)
        runs[name] = told
        if [told[what] != runs["bare"][what] for what in ("steps", "tokens")] != [False, False]:
            sys.exit(f"{name} has done {told['steps']} steps on {told['tokens']} tokens, the bare loop others")
    return runs


def judged(folder: Path, clients: int) -> dict[str, dict[str, float]]:
    """Return the rivals' held-out losses and their adapters' distances from flexperts'."""
    ours = folder / f"fedavg-{clients}.safetensors"
    others = [folder / f"{name}-{clients}.safetensors" for name in RIVALS]
    judge = Path(__file__).parent / "rival_systems" / "judge.py"
    command = [sys.executable, *map(str, (judge, folder, clients, ours, ours, *others))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {Path(path).stem.partition("-")[0]: told for path, told in found.items()}


def alike(losses: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a sentence on how similar the results are; refuse results that differ."""
    gaps = {}
    for clients, told in losses.items():
        gain = told["start"]["loss"] - told["fedavg"]["loss"]
        gaps |= {(name, clients): abs(told[name]["loss"] - told["fedavg"]["loss"]) / gain for name in RIVALS}
    widest = max(gaps, key=lambda one: gaps[one])
    if gaps[widest] > TOLERANCE:
        sys.exit(f"{widest[0]}, {widest[1]} clients: its loss differs by {gaps[widest]:.1%} of the gain from ours")
    return (
        "All systems did the same steps on the same tokens. On rows not used in training, the rivals' averaged "
        f"adapters differ in loss from flexperts' by at most {gaps[widest]:.1%} of what training has gained."
    )


def figures(costs: Costs) -> Iterator[Figure]:
    """Yield each system's round over the bare loop's, and whether any rival is faster."""
    for clients, found in costs.items():
        for name, limit in LIMITS.items():
            ratio = found[name].wall / found["bare"].wall
            yield Figure(f"{SYSTEMS[name]}: a round over the bare loop's, {clients} clients", ratio, limit=limit)
        for name in ("fedavg", "flex"):
            ours, theirs = found[f"{name}2"], found[name]
            what = f"{SYSTEMS[name]}, {clients} clients: with a worker per core over in process"
            yield Figure(f"{what}, a round", ours.wall / theirs.wall, at_most=0.65)
            yield Figure(f"{what}, memory", ours.memory / theirs.memory, at_most=1.3)
        fastest = min(RIVALS, key=lambda name: found[name].wall)
        memory = found[fastest].memory / found["fedavg2"].memory
        yield Figure(
            f"the fastest rival's round over flexperts' with fedavg and a worker per core, {clients} clients",
            found[fastest].wall / found["fedavg2"].wall,
            at_least=1.0,
            limit=f"the fastest is {SYSTEMS[fastest]}, in {memory:.1f} times the memory",
        )


def table(costs: Costs) -> str:
    """Return all costs as a Markdown table."""
    lines = [
        "| clients | system | first round | later rounds | their CPU | beyond the bare loop, per client | memory |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for clients, found in costs.items():
        for name, cost in found.items():
            beyond = (cost.wall - found["bare"].wall) / clients
            lines.append(
                f"| {clients} | {SYSTEMS[name]} | {cost.first:.1f} s | {cost.wall:.1f} s | {cost.cpu:.1f} s "
                f"| {beyond:.2f} s | {cost.memory:.2f} GiB |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
