"""Bytes of a message besides its weights, in both directions and with every packing, and the cost of packing.

    python benchmarks/performance/message_bytes.py

Each kind is one round of FLEx on four silos of a few rows: the bytes are those that the run's own ledger holds, as
Flower encodes them. They depend on names and sizes of what is sent, not on rows or steps. What packing costs in
quality is on docs/communication.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from figures import ROOT, Benchmark, Figure, parser

from flexperts.artifacts import RunDirectory
from flexperts.client.workspace import Workspace
from flexperts.communication.compression import pack
from flexperts.config.federation import CompressionConfig
from flexperts.engines.run import run_federation
from flexperts.recipe import load_recipe

RECIPE = ROOT / "recipes" / "quickstart.toml"
SMALL = (
    "data.silos.train_rows=4",
    "data.silos.test_rows=4",
    "training.local_steps=1",
    "training.batch_size=1",
    "federation.rounds=1",
    "graft.selection=random",
    "evaluation.rows=1",
    "evaluation.max_new_tokens=1",
    "method.reference=",
)
ENTRIES = {"none": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4", "top_k": "top_k 5 %"}
"""Kind of packing -> its name on the page."""
_FP32 = 4
"""Bytes of a value."""

Ledger = dict[str, int]


def ledger(kind: str, folder: Path, workspace: Workspace | None) -> tuple[Ledger, Workspace]:
    """Run one round; return the bytes of its messages and payloads, added up over clients, and the workspace."""
    config = load_recipe(RECIPE, (*SMALL, f"compression.kind={kind}"))
    workspace = workspace or Workspace(config)
    run_federation(config, folder, workspace=workspace)
    (log,) = RunDirectory.open(folder).rounds()
    clients = len(log["uplink"])
    values = sum(log["declared"]["uplink"].values()) // clients // _FP32
    return {
        "clients": clients,
        "uplink": sum(log["uplink"].values()),
        "uplink payload": clients * packed_bytes(values, config.compression),
        "downlink": sum(log["downlink"].values()),
        "downlink payload": sum(log["declared"]["downlink"].values()),
    }, workspace


def packed_bytes(values: int, settings: CompressionConfig) -> int:
    """Return the size of an update of so many values: that of the packed arrays alone, or of its fp32 values."""
    if settings.kind == "none":
        return _FP32 * values
    return sum(array.nbytes for array in pack(np.ones(values, np.float32), settings).arrays.values())


def figure(name: str, found: Ledger, direction: str, also: str = "") -> Figure:
    """Return how much larger the encoded messages of a direction are than their payload."""
    payload = found[f"{direction} payload"]
    more = found[direction] - payload
    return Figure(
        f"{direction}, {name}: encoded message beyond its payload",
        100 * more / payload,
        "%",
        at_most=1,
        limit=f"{more / found['clients']:,.0f} bytes a message, whatever its size: Flower's records and headers"
        f"{'' if also else ', names and shapes of the tensors'}.{also}",
    )


def main() -> None:
    """Run every kind once, and write message_bytes.json."""
    given = parser(__doc__).parse_args()
    benchmark = Benchmark(
        "message_bytes",
        "Bytes of messages",
        "One round of FLEx (attention LoRA of rank 8) on `smol-moe`, four silos: encoded bytes of the messages, as "
        "the run's ledger has them, over the bytes of the weights in them; 1 % more is a ratio of 1.01.",
        notes=["Downlinks are not packed here."],
    )
    found: dict[str, Ledger] = {}
    workspace: Workspace | None = None
    with tempfile.TemporaryDirectory() as folder:
        for kind in ENTRIES:
            found[kind], workspace = ledger(kind, Path(folder) / kind, workspace)
            print(f"{kind}: {found[kind]}", flush=True)
    whole = found["none"]["uplink"]
    share = {kind: f" {one['uplink'] / whole:.1%} of the fp32 message." for kind, one in found.items()}
    figures = [
        figure("fp32", found["none"], "uplink"),
        figure("fp32", found["none"], "downlink"),
        *(figure(name, found[kind], "uplink", share[kind]) for kind, name in ENTRIES.items() if kind != "none"),
    ]
    benchmark.write(given.out, figures, {"settings": SMALL, "bytes": found})


if __name__ == "__main__":
    main()
