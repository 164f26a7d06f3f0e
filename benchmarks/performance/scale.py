"""Rounds of few participants among 10 to 10,000 silos, more participants among 1,000, and the server's averaging.

    python benchmarks/performance/scale.py                                  # under 8 minutes
    python benchmarks/performance/scale.py --silos 10 100 --clients 10      # a trial

Every size runs in a separate process (scale_run.py), and so does the averaging (scale_aggregation.py). Every silo
has a folder with its own two files, as real ones would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import scale_page
from figures import RESULTS, Benchmark, Figure, parser

from flexperts.testing import save_tiny_base

SILOS = (10, 100, 1_000, 10_000)
PARTICIPANTS = 10
MORE = (20, 40)
"""Participants at the second largest size, in addition to the usual ones."""
TRAIN, TEST = 6, 2
"""Rows of a silo."""
RUNS = 5
MEGABYTES = 20

Sizes = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Run all sizes and the averaging."""
    options = parser(__doc__)
    options.add_argument("--silos", type=int, nargs="+", default=SILOS, help="numbers of silos, at least two")
    options.add_argument("--clients", type=int, default=100, help="updates that are averaged")
    given = options.parse_args()
    benchmark = Benchmark("scale", "Many silos", _WORKLOAD, _NOTES)
    with tempfile.TemporaryDirectory() as folder:
        sizes = measure(Path(folder), sorted(given.silos))
    averaging = _child("scale_aggregation.py", {"clients": given.clients, "megabytes": MEGABYTES, "times": 7})
    print("averaged", flush=True)
    rows = {"train": TRAIN, "test": TEST}
    details = {"sizes": sizes, "averaging": averaging, "rows_of_a_silo": rows}
    benchmark.write(given.out, [*of_silos(sizes), *of_participants(sizes), *of_averaging(averaging)], details)
    if given.out == RESULTS:
        scale_page.write()


def measure(folder: Path, silos: list[int]) -> dict[str, dict[str, Any]]:
    """Return what each size measured, by "SILOS silos, PARTICIPANTS participants"."""
    base = str(save_tiny_base(folder / "base"))
    wanted = [(number, PARTICIPANTS) for number in silos] + [(silos[-2], number) for number in MORE]
    found = {}
    for number, participants in wanted:
        if participants > number:
            continue
        data = folder / f"data-{number}"
        if not data.exists():
            write_silos(data, number)
        name = f"{number} silos, {participants} participants"
        out = folder / f"{number}-{participants}"
        out.mkdir()
        size = {"silos": number, "participants": participants, "runs": RUNS, "base": base, "folder": str(out)}
        started = time.perf_counter()
        found[name] = size | _child("scale_run.py", size | {"data": {"folder": str(data)}})
        found[name] |= {"folder": "", "base": "tiny", "median_round": _median(found[name], "round")}
        print(
            f"{name}: {found[name]['median_round']:.2f} s a round ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    return found


def write_silos(folder: Path, number: int) -> None:
    """Write a folder of silos, each with rows of its own."""
    for silo in range(number):
        place = folder / f"silo-{silo:06}"
        place.mkdir(parents=True)
        rows = [json.dumps(_row(silo, row)) + "\n" for row in range(TRAIN + TEST)]
        (place / "train.jsonl").write_text("".join(rows[:TRAIN]), encoding="utf-8")
        (place / "test.jsonl").write_text("".join(rows[TRAIN:]), encoding="utf-8")


def of_silos(sizes: Sizes) -> list[Figure]:
    """Return what more silos cost at the same number of participants."""
    few, many = _ends(sizes)
    name = f"{many['silos']:,} silos over {few['silos']}, {PARTICIPANTS} participants"
    joining = 1e6 * _median(many, "joining") / many["silos"]
    return [
        Figure(f"time per round: {name}", many["median_round"] / few["median_round"], at_most=1.25, limit=_ROUND),
        Figure(f"peak memory: {name}", many["peak_bytes"] / few["peak_bytes"], at_most=1.25, limit=_MEMORY),
        Figure(
            f"memory per silo, from {few['silos']} to {many['silos']:,} silos",
            (many["peak_bytes"] - few["peak_bytes"]) / (many["silos"] - few["silos"]) / 1024,
            "KiB",
            limit=f"its {TRAIN + TEST} rows are held as text; its encoded rows and its state are not",
        ),
        Figure(
            "most open files at any size",
            max(run["open_files"] for one in sizes.values() for run in one["runs"]),
            "files",
            at_most=64,
            limit="a state is opened, read and closed in its silo's turn",
        ),
        Figure("joining, per silo, once", joining, "us", at_most=1000, limit="Flower's messages, built and read"),
        Figure(
            "reading and checking rows, per silo, once",
            1e3 * (many["reading"] + many["encoding"]) / many["silos"],
            "ms",
            limit=f"the tokenizer: its {TRAIN + TEST} rows are encoded once before the run, to find a bad one",
        ),
    ]


def of_participants(sizes: Sizes) -> list[Figure]:
    """Return what more participants cost at the same number of silos."""
    numbers = {one["participants"]: one for one in sizes.values() if one["silos"] == _second(sizes)}
    if not numbers.keys() >= {PARTICIPANTS, *MORE}:
        return []
    few, many = numbers[PARTICIPANTS], numbers[MORE[-1]]
    each = {count: one["median_round"] / count for count, one in numbers.items()}
    return [
        Figure(
            f"time per participant: {MORE[-1]} participants over {PARTICIPANTS}, {few['silos']:,} silos",
            each[MORE[-1]] / each[PARTICIPANTS],
            at_most=1.25,
            limit="participants take turns on one base: selection, training, state, message",
        ),
        Figure(
            f"peak memory: {MORE[-1]} participants over {PARTICIPANTS}, {few['silos']:,} silos",
            many["peak_bytes"] / few["peak_bytes"],
            at_most=1.25,
            limit="updates are added as they come; the encoded rows of the last 64 silos are kept",
        ),
    ]


def of_averaging(found: Mapping[str, Any]) -> list[Figure]:
    """Return the cost of the server's averaging, compared with a sum."""
    clients = "updates of 20 MB, one core"
    return [
        Figure(
            f"averaging {clients}, over torch's running sum of the same buffers",
            found["mean_ratio"],
            at_most=2.0,
            limit="memory: the running mean is read and written for every update, as the plain sum is",
        ),
        Figure(
            "the same with decoding, checking and counting of their messages",
            found["ratio"],
            limit="two passes over the bytes: the norm, which also finds values that are not finite, and the "
            "weighted sum",
        ),
        Figure(
            "the same by a step for each purpose, over the same sum",
            found["by_copies_ratio"],
            limit="copies, and hashing every message to learn its size",
        ),
    ]


def _child(script: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """Run a script of this folder in a process with one thread and return the JSON of its last line."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), json.dumps(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} {json.dumps(size)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(silo: int, row: int) -> dict[str, str]:
    code = str(silo * 7919 % 1000 + row)
    return {
        "instruction": f"Which code has item {row} of silo {silo}?",
        "context": f"Note {silo}-{row}: the item is kept under the code {code} until it is called for.",
        "response": f"The code is {code}.",
    }


def _median(one: Mapping[str, Any], measure: str) -> float:
    return float(median(run[measure] for run in one["runs"]))


def _ends(sizes: Sizes) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    usual = [one for one in sizes.values() if one["participants"] == PARTICIPANTS]
    return usual[0], usual[-1]


def _second(sizes: Sizes) -> int:
    return int(sorted({one["silos"] for one in sizes.values()})[-2])


_WORKLOAD = (
    f"FLEx on the tiny random base of `flexperts.testing`: {PARTICIPANTS} participants a round, two steps of four "
    "rows, all silos in one process, one thread. Each size is a fresh process; a warm-up, then "
    f"{RUNS - 1} runs of one round, so that every participant selects its experts and keeps its first state."
)
_NOTES = (
    "The model is tiny so that what depends on the number of silos shows; a real one's training hides it. "
    "Memory is the process's peak (ru_maxrss). A round's time is from its start to its line in rounds.jsonl, with "
    "the checkpoint, without evaluation; 10 silos are scored in the end (`evaluation.clients = 10`).",
    "The averaging starts from encoded replies in memory. Both sides run on one core; the network is not counted.",
)
_ROUND = "who takes part is drawn among all, and the checkpoint holds every silo's name and row count"
_MEMORY = "the base, torch and one participant's training; rows are held as text"

if __name__ == "__main__":
    main()
