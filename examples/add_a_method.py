"""Adding a method: one small class and one registration.

FedMedian-style: FedAvg's frame, but the server takes the coordinate-wise median of the shared weights, which
one wrong silo cannot shift far (Yin et al., ICML 2018).

    python examples/add_a_method.py model.base=FOLDER
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexperts import Method, Server, Update, load_recipe, register_method, run_federation

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


class MedianLora(Method):
    """Coordinate-wise median of attention LoRA; all updates are held at once."""

    name = "median-lora"
    summary = "attention LoRA, median over clients; nothing personal"
    source = "Yin et al., ICML 2018"

    def aggregate(self, server: Server, updates: Iterable[Update]) -> None:
        median = np.median(np.stack([update.vector for update in updates]), axis=0)
        server.shared = replace(server.shared, vector=median.astype(np.float32))


def main(out: Path, *overrides: str) -> None:
    register_method(MedianLora.name, MedianLora)
    config = load_recipe(RECIPE, [f"method.name={MedianLora.name}", *overrides])
    print(run_federation(config, out)["mean"]["rouge_l"])


if __name__ == "__main__":
    main(Path("runs/median-lora"), *sys.argv[1:])
