"""What secure aggregation costs: one round of the protocol without models, in one thread.

    OMP_NUM_THREADS=1 python benchmarks/secure_aggregation.py --out benchmarks/results/secure_aggregation.json
    python benchmarks/secure_aggregation.py --table benchmarks/results/secure_aggregation.json

Prints a table: milliseconds of a client (keys, masks, shares) and of the server (sum and unmasking), bytes, and the
error of the mean. Each number is the median of five rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.messages import Rules
from flexperts.communication.secure.silo import Silo, State
from flexperts.communication.secure.tally import Tally, new_session
from flexperts.environment import environment

VALUES, RULES, ROUNDS = 645_120, Rules(clip=20.0), 5
CASES = ((4, 0), (4, 1), (8, 0), (8, 2), (20, 0), (20, 5))
"""Clients, and how many of them drop out before they send their update."""


def measured(clients: int, dropped: int) -> dict[str, Any]:
    """Return the medians of some rounds."""
    rounds = [one_round(clients, dropped, number) for number in range(1, ROUNDS + 1)]
    return {"clients": clients, "dropped": dropped} | {
        key: median(each[key] for each in rounds) for key in rounds[0]
    }


def one_round(clients: int, dropped: int, number: int) -> dict[str, float]:
    """Return one round's costs: milliseconds, bytes of a client besides its update, largest error of the mean."""
    stream, spent, sizes = np.random.default_rng(number), dict.fromkeys(("client", "server"), 0.0), 0
    names = [f"silo-{i:02}" for i in range(clients)]
    silos = {name: Silo(name, ciphers.new_secret(), State(), RULES) for name in names}
    changes = {name: stream.normal(0, 0.013, VALUES).astype(np.float32) for name in names}
    cards = {name: silo.card("run") for name, silo in silos.items()}
    tally = Tally(new_session("run", number, cards, dict.fromkeys(names, 1), RULES))

    def timed(who: str, function: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        found = function(*arguments)
        spent[who] += 1e3 * (time.perf_counter() - started)
        return found

    def size(*messages: Any) -> int:
        return sum(len(message.model_dump_json()) for message in messages)

    for name in names:
        asked = tally.setup(name)
        answer = timed("client", silos[name].advertise, asked)
        sizes += size(asked, answer)
        timed("server", tally.advertise, name, answer)
    for name in names[dropped:]:
        told = tally.masking(name)
        sizes += size(told)
        timed("server", tally.add, name, timed("client", silos[name].masked, told, number, changes[name], 1))
    for name in tally.survivors:
        asked_for = tally.unmask(name)
        shares = timed("client", silos[name].reveal, asked_for)
        sizes += size(asked_for, shares)
        timed("server", tally.reveal, name, shares)
    total, _ = timed("server", tally.total)
    exact = np.mean([changes[name].astype(np.float64) for name in tally.survivors], axis=0)
    error = float(np.abs(tally.numbers.decode(total) / tally.weight - exact).max())
    return {
        "client_ms": spent["client"] / clients,
        "server_ms": spent["server"],
        "bytes": sizes / clients,
        "error": error,
    }


def table(entries: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    names = ("clients", "dropped", "ms of a client", "ms of the server", "keys and shares", "of an update", "error")
    head = f"| {' | '.join(names)} |"
    rows = [
        f"| {e['clients']} | {e['dropped']} | {e['client_ms']:.0f} | {e['server_ms']:.0f} | "
        f"{e['bytes'] / 1000:.1f} kB | {e['bytes'] / (4 * VALUES):.2%} | {e['error']:.1e} |"
        for e in entries
    ]
    return "\n".join([head, "|---:|---:|---:|---:|---:|---:|---:|", *rows])


def main() -> None:
    """Measure, or print a file's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    entries = json.loads(given.table.read_text())["entries"] if given.table else [measured(*case) for case in CASES]
    if given.out:
        given.out.write_text(json.dumps({"environment": environment(), "entries": entries}, indent=2) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
