"""Latency of the serving engine when more clients are asked than have a place in memory, on a tiny base.

    python benchmarks/serving_clients.py --out runs/serving-clients

Makes one short FLEx run with whole personal experts, and gives so many clients a state each: the trained
states with some noise. Then one request after the other goes to a client drawn at random, and each is timed
from its arrival to its first token. Few places are compared with a place for every client; a request for a
client that is not in memory waits for one load. Writes serving_clients.json.
"""

from __future__ import annotations

import argparse
import queue
import random
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from flexperts.client.client import Client
from flexperts.engines.run import run_federation
from flexperts.environment import environment
from flexperts.files import write_json
from flexperts.finished.trained import TrainedRun
from flexperts.recipe import parse_recipe
from flexperts.serving.contract import ModelName, Piece, Sampling
from flexperts.serving.engine.engine import ServingEngine
from flexperts.testing import save_tiny_base

RECIPE = """
[model]
base = "{base}"
[data.silos]
train_rows = 4
test_rows = 4
[training]
local_steps = 1
batch_size = 1
[graft]
calibration_rows = 1
[federation]
rounds = 1
[evaluation]
rows = 1
max_new_tokens = 1
"""
QUESTION = [{"role": "user", "content": "What is this note about?"}]
TOKENS = 4


class ManyClients(TrainedRun):
    """A run's models under the names of many clients, each with a state of its own on disk.

    Args:
        path: The run directory.
        count: Number of clients.
    """

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path)
        stored = [self.client(name).store.load(10**9) for name in self.clients]
        self._names = [f"client-{number}" for number in range(count)]
        stream = torch.Generator().manual_seed(0)
        for number, name in enumerate(self._names):
            tensors, meta = stored[number % len(stored)] or ({}, None)
            assert meta is not None
            noisy = {n: t + 1e-3 * torch.randn(t.shape, generator=stream) for n, t in tensors.items()}
            Client(name, self.workspace, self.model, self.run.path).store.save(noisy, meta)

    @property
    def clients(self) -> list[str]:
        """The names; before they are made, those of the run."""
        return self.__dict__.get("_names") or super().clients


def first_token(engine: ServingEngine, client: str) -> float:
    """Return the seconds from a request's arrival to its first token; wait for its end."""
    pieces: queue.SimpleQueue[tuple[float, Piece]] = queue.SimpleQueue()
    prompt = engine.prompt_tokens(QUESTION)
    start = time.perf_counter()
    engine.submit(
        ModelName(client, "personalized"), prompt, Sampling(TOKENS), lambda p: pieces.put((time.perf_counter(), p))
    )
    found = [pieces.get()]
    while found[-1][1].finish is None:
        found.append(pieces.get())
    if found[-1][1].error is not None:
        raise found[-1][1].error
    return found[0][0] - start


def measure(run: Path, clients: int, places: int, requests: int) -> dict[str, Any]:
    """Return the latency of requests to clients drawn at random."""
    trained = ManyClients(run, clients)
    size = trained.client(trained.clients[0]).store.path.stat().st_size
    engine = ServingEngine(trained, max_clients=places, company=0)
    drawn = random.Random(0)
    order = [drawn.choice(trained.clients) for _ in range(requests)]
    for client in order[:places]:
        first_token(engine, client)  # fills the places
    seconds = [first_token(engine, client) for client in order]
    engine.close()
    return {
        "clients": clients,
        "places": places,
        "state_bytes": size,
        "median_ms": 1000 * median(seconds),
        "p95_ms": 1000 * quantiles(seconds, n=20)[-1],
    }


def main() -> None:
    """Measure all numbers of clients, print them, write serving_clients.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 32, 256])
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100)
    given = parser.parse_args()
    out = given.out.resolve()
    if not (out / "run" / "summary.json").exists():
        base = save_tiny_base(out / "base", max_position_embeddings=1024)
        run_federation(parse_recipe(RECIPE.format(base=base), []), out / "run")
    rows = []
    for clients in given.clients:
        for places in sorted({min(given.places, clients), clients}):
            rows.append(measure(out / "run", clients, places, given.requests))
            print(rows[-1], flush=True)
    write_json(
        out / "serving_clients.json", {"environment": environment(), "requests": given.requests, "rows": rows}
    )


if __name__ == "__main__":
    main()
