"""How much of one real update each kind of packing loses: one silo of the quick start trains one round with FedAvg.

    python benchmarks/packing_error.py
    python benchmarks/packing_error.py --set model.base=DIR training.local_steps=2

Prints the update's size and norm, a table of bytes and relative L2 errors, and what top_k would lose in the same
bytes with fp32 values in place of fp16 ones.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from flexperts.client.client import Client
from flexperts.client.model import ClientModel
from flexperts.client.request import Request
from flexperts.client.workspace import Workspace
from flexperts.communication.compression import Packed, pack, unpack
from flexperts.communication.messages import records
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.federation import CompressionConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.methods.registry import make_method
from flexperts.parameters.vector import Payload, Vector
from flexperts.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
PACKINGS = {
    "fp16": CompressionConfig(kind="fp16"),
    **{f"int8, blocks of {size}": CompressionConfig(kind="int8", block=size) for size in (64, 256, 1024)},
    **{f"int4, blocks of {size}": CompressionConfig(kind="int4", block=size) for size in (64, 256)},
    **{f"top_k {share:.0%}": CompressionConfig(kind="top_k", fraction=share) for share in (0.25, 0.05, 0.01)},
    **{f"top_k_int4 {share:.0%}": CompressionConfig(kind="top_k_int4", fraction=share) for share in (0.2, 0.05)},
    **{f"top_k_sign {share:.0%}": CompressionConfig(kind="top_k_sign", fraction=share) for share in (1.0, 0.5)},
}


def one_update(settings: list[str], folder: Path) -> tuple[Payload, Vector]:
    """Return the first weights of a run and what the first client's first round changes in them."""
    config = load_recipe(RECIPE, ("method.name=fedavg", *settings))
    workspace = Workspace(config)
    model = ClientModel(workspace.base, config, make_method(config.method))
    client = Client(min(workspace.clients), workspace, model, folder)
    client.join()
    sent, _ = client.initial(None)
    trained = client.train(Request(sent, None, 1))
    return sent, trained.update.vector - sent.vector


def line(name: str, sent: Payload, change: Vector, packed: Packed | None) -> str:
    """Return one row of the table."""
    got = change if packed is None else unpack(packed, change.size, PACKINGS[name], name)
    whole, size = (encoded_bytes(records({}, {}, sent, some)) for some in (None, packed))
    error = np.linalg.norm(got - change) / np.linalg.norm(change)
    return f"| {name} | {size:,} | {size / whole:.1%} | {error:.2g} |"


def fp32_error(change: Vector, fraction: float) -> float:
    """Return the relative error of top_k with fp32 values in the bytes of a fraction with fp16 values."""
    sizes = np.sort(np.abs(change))[: change.size - round(fraction * change.size * 6 / 8)]
    return float(np.linalg.norm(sizes) / np.linalg.norm(change))


def main() -> None:
    """Train one round and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    assume_identity(1)
    with tempfile.TemporaryDirectory() as folder:
        sent, change = one_update(parser.parse_args().settings, Path(folder))
    norm = float(np.linalg.norm(change.astype(np.float64)))
    print(f"{change.size:,} values, L2 norm {norm:.3g}, root mean square {norm / change.size**0.5:.3g}\n")
    print("| packing | bytes sent | of unpacked | relative L2 error |\n|---|---:|---:|---:|")
    print(line("none", sent, change, None))
    for name, settings in PACKINGS.items():
        print(line(name, sent, change, pack(change, settings)))
    print(f"\ntop_k with fp32 values, in the bytes of 5 %: {fp32_error(change, 0.05):.3f}")


if __name__ == "__main__":
    main()
