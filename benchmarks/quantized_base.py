"""What quantizing its experts does to the shipped base: bytes, NLL, and the experts that its routers choose.

    python benchmarks/quantized_base.py --rows 10

Rows are the first test rows of the four shipped silos; no adapter, bf16 autocast. Agreement is the mean share of a
token's chosen experts that are the unquantized base's, on prompts and responses, averaged over layers.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from flexperts.config.data import DataConfig, SilosConfig
from flexperts.config.model import ModelConfig
from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.clients import load_clients
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.scores import EvaluationSettings, evaluate
from flexperts.modeling.load import load_base
from flexperts.modeling.quantization import storage
from flexperts.modeling.routing import LayerRouting, record_routing, summarize_routing
from flexperts.moe.experts import find_experts

SCHEMES = ("none", "int8", "nf4")


def measure(base: str, scheme: str, rows: list[Row], truth: dict[str, LayerRouting]) -> dict[str, Any]:
    """Return one scheme's numbers; ``truth`` keeps the routing of the base that comes first."""
    loaded = load_base(ModelConfig(base=base, quantization=scheme))  # type: ignore[arg-type]
    encoder = PromptEncoder(loaded.tokenizer)
    started = time.perf_counter()
    scores = evaluate(loaded.model, encoder, rows, EvaluationSettings(1, 4, "bf16", False))
    seconds = time.perf_counter() - started
    routing = record_routing(loaded.model, find_experts(loaded.model), _batches(encoder, rows), "bf16")
    for name, layer in routing.items():
        truth.setdefault(name, layer)
    agreement = [summarize_routing(routing[name], truth[name])["agreement"] for name in routing]
    parts = {row.part: row for row in storage(loaded.model)}
    return {
        "quantization": scheme,
        "expert_bytes": parts["routed experts"].after,
        "bytes": sum(row.after for row in parts.values()),
        "nll": round(scores.nll, 4),
        "agreement": round(sum(agreement) / len(agreement), 4),
        "seconds": round(seconds, 1),
    }


def _batches(encoder: PromptEncoder, rows: list[Row]) -> list[PaddedBatch]:
    examples = encoder.encode_all(rows)
    return [pad_batch(examples[i : i + 4], encoder.tokenizer.pad_token_id) for i in range(0, len(examples), 4)]


def main() -> None:
    """Measure every scheme and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smol-moe")
    parser.add_argument("--rows", type=int, default=10, help="test rows of each silo")
    given = parser.parse_args()
    clients = load_clients(DataConfig(silos=SilosConfig(seed=0)), 0)
    rows = [row for client in clients.values() for row in client.test[: given.rows]]
    truth: dict[str, LayerRouting] = {}
    for scheme in SCHEMES:
        print(json.dumps(measure(given.base, scheme, rows, truth)), flush=True)


if __name__ == "__main__":
    main()
