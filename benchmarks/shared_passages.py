"""Count the test rows of nineteen silos whose passages are among the rows by which settings were chosen.

    python benchmarks/shared_passages.py

Reads the rows of ``recipes/study-nineteen.toml`` and ``recipes/search-p3.toml``; no model is loaded. For each part
of the search's rows it prints how many test rows ask about one of its passages, of the silos that train and of
newcomers, and how many of these have the same text.
"""

from __future__ import annotations

from pathlib import Path

from prepare_p3 import passage

from flexperts.data.clients import Clients, load_clients
from flexperts.data.rows import Row
from flexperts.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def asked(row: Row) -> str:
    """Return the passage that a row asks about."""
    return passage({"instruction": row.instruction})


def main() -> None:
    """Print the counts."""
    study, search = (load_recipe(RECIPES / f"{name}.toml") for name in ("study-nineteen", "search-p3"))
    silos: Clients = load_clients(study.data, study.seed)
    chosen_by = load_clients(search.data, search.seed)
    newcomers = {*study.compare.newcomers}
    parts = {
        part: [row for its in chosen_by.values() for row in getattr(its, part)] for part in ("validation", "train")
    }
    for part, rows in parts.items():
        passages, texts = {asked(row) for row in rows}, {(row.instruction, row.context) for row in rows}
        for who, names in (("silos that train", silos.keys() - newcomers), ("newcomers", newcomers)):
            tests = [row for name in names for row in silos[name].test]
            hit = [row for row in tests if asked(row) in passages]
            same = sum((row.instruction, row.context) in texts for row in hit)
            print(
                f"{len(rows)} {part} rows of the search: {len(hit)} of {len(tests)} test rows of {who} "
                f"ask about one of their passages, {same} with the same text"
            )


if __name__ == "__main__":
    main()
