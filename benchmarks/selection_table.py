"""Reconstruction loss of every expert, per silo and layer, from a run's personal files, as a Markdown table.

python benchmarks/selection_table.py runs/quickstart-...
"""

import statistics
import sys
from pathlib import Path

from flexperts.parameters.store import PersonalMeta, load_personal


def metas(run: Path) -> list[PersonalMeta]:
    """Return every client's meta, sorted by client."""
    return [load_personal(path)[1] for path in sorted((run / "personal").glob("*.safetensors"))]


def line(meta: PersonalMeta, layer: str) -> str:
    """Return one table row: who, where, which expert, and how much better it is than the others."""
    losses = sorted(meta.selection[layer])
    number = next(part for part in layer.split(".") if part.isdigit())
    chosen = "+".join(map(str, meta.choice[layer]))
    values = (losses[0], statistics.median(losses), losses[-1])
    return f"| {meta.client} | {number} | {chosen} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main(run: Path) -> None:
    """Print the table."""
    print("| silo | layer | chosen expert | best | median | worst |\n|---|---|---|---|---|---|")
    for meta in metas(run):
        for layer in meta.choice:
            print(line(meta, layer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
