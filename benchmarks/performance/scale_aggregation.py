"""The server's part of a round, on encoded replies as received, compared with a plain sum of the same."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict

from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update, records
from flexperts.communication.traffic import encoded_bytes, encoded_objects
from flexperts.config.run import RunConfig
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Manifest, Payload, Vector
from flexperts.server.admission import Admission

ROWS = 96


def main() -> None:
    """Compare; the command line holds {"clients": ..., "megabytes": ..., "times": ...}."""
    size = json.loads(sys.argv[1])
    print(json.dumps(compare(size["clients"], size["megabytes"], size["times"])))


def compare(clients: int, megabytes: int, times: int) -> dict[str, Any]:
    """Return seconds of each way, run by run and in turn, and whether all gave the same mean."""
    values = megabytes * 250_000
    server = _server(clients, values)
    replies = {name: _reply(name, server, number) for number, name in enumerate(server.clients)}
    buffers = [_values(content, values) for content in replies.values()]
    admission = Admission(FedAvg(), _config(), server)
    updates = list(_admitted(admission, replies))
    ways: dict[str, Callable[[], Vector]] = {
        "plain_sum": lambda: _plain_sum(buffers),
        "numpy_sum": lambda: _numpy_sum(buffers),
        "mean": lambda: weighted_mean(iter(updates)),
        "server": lambda: weighted_mean(_admitted(admission, replies)),
        "by_copies": lambda: _by_copies(admission, replies),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    means: dict[str, Vector] = {}
    for _ in range(times):
        for way, work in ways.items():
            started = time.perf_counter()
            means[way] = work()
            seconds[way].append(time.perf_counter() - started)
    return {
        "seconds": seconds,
        "mean_ratio": _ratio(seconds, "mean", "plain_sum"),
        "ratio": _ratio(seconds, "server", "plain_sum"),
        "by_copies_ratio": _ratio(seconds, "by_copies", "plain_sum"),
        "clients": clients,
        "payload_bytes": 4 * values,
        "threads": torch.get_num_threads(),
        "same_bits": bool((means["server"] == means["by_copies"]).all()),
    }


def _ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def _plain_sum(buffers: list[Vector]) -> Vector:
    total = torch.zeros(buffers[0].size)
    for buffer in buffers:
        total.add_(torch.from_numpy(buffer))
    return total.numpy()


def _numpy_sum(buffers: list[Vector]) -> Vector:
    total = np.zeros_like(buffers[0])
    for buffer in buffers:
        np.add(total, buffer, out=total)
    return total


def _admitted(admission: Admission, replies: dict[str, RecordDict]) -> Iterator[Update]:
    """Yield updates as the server takes them: decoded, checked, their bytes counted."""
    for name, content in replies.items():
        update = admission.update(name, content)
        encoded_bytes(content)
        yield update


def _by_copies(admission: Admission, replies: dict[str, RecordDict]) -> Vector:
    """Do the same by steps that each go over all values: decode, check, count, check again, weigh, add."""
    total: Any = None
    start = admission.server.shared.vector.astype(np.float64)
    for content in replies.values():
        vector = content.array_records["shared"]["shared"].numpy()
        assert np.isfinite(vector).all()
        assert np.sqrt(np.square(vector - start).mean()) < admission.config.federation.max_update_rms
        array = content.array_records["shared"]["shared"]
        array.data = array.data  # as if just received: without Flower's cached encoding
        sum(len(part) for part in encoded_objects(content))
        assert np.isfinite(vector).all()
        weighted = vector * np.float32(ROWS)
        total = weighted if total is None else total + weighted
    return np.asarray(total / np.float32(ROWS * len(replies)), dtype=np.float32)


def _server(clients: int, values: int) -> Server:
    start = np.random.default_rng(0).standard_normal(values, dtype=np.float32) * np.float32(0.02)
    names = {f"client-{number:03}": ROWS for number in range(clients)}
    return Server(Payload(Manifest(("lora.w",), ((values,),)), start), names)


def _reply(name: str, server: Server, number: int) -> RecordDict:
    """Return a client's reply to round 1."""
    stream = np.random.default_rng(number + 1)
    trained = server.shared.vector * np.float32(1 + stream.uniform(-0.1, 0.1))
    measures = {"loss": 1.0, "steps": 2, "tokens": 900, "shared_parameters": trained.size, "personal_parameters": 1}
    payload = Payload(server.shared.manifest, trained)
    info = {"client": name, "round": 1, "base": ""}
    return records(info, {**measures, "rows": ROWS, "personal_sent": 0}, payload)


def _values(content: RecordDict, values: int) -> Vector:
    """Return a view of a reply's values that torch accepts as writable."""
    data = content.array_records["shared"]["shared"].data
    found = np.frombuffer(memoryview(data), np.float32, values, len(data) - 4 * values)
    return torch.frombuffer(found, dtype=torch.float32).numpy()


def _config() -> RunConfig:
    return RunConfig.model_validate({"data": {"at_silos": True}, "method": {"name": "fedavg"}})


if __name__ == "__main__":
    main()
