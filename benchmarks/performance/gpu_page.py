"""Write docs/gpu.md from the card tier's files, and from what a stand-in for a card counts, before and now.

What was not measured on a card says so.

python benchmarks/performance/gpu_page.py            # gpu.py does it itself
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import figures
from gpu_card import Section
from page import section

RESULTS = figures.RESULTS / "gpu"
PAGE = figures.ROOT / "docs" / "gpu.md"
BUDGETS = figures.ROOT / "tests" / "pretend_cuda" / "budgets.toml"
BEFORE = BUDGETS.with_name("before.toml")
KINDS = {"launches": "kernels", "waits": "waits", "uploads": "copies to the card", "fetched": "bytes fetched"}
UNITS = {
    "step": "a training step of one micro-batch",
    "micro_batch": "each further micro-batch in it",
    "layer": "each further layer in it",
    "token": "a token of every row",
    "batch": "a scored batch of two rows",
}


def page(sections: Iterable[Section], results: Path = RESULTS) -> str:
    """Return the page; a section without a file says so."""
    template = Path(__file__).with_name("gpu.template.md").read_text(encoding="utf-8")
    shown = "\n\n".join(_section(one, results) for one in sections)
    return template.format(sections=shown, counted="\n".join(_counted()))


def _counted() -> Iterator[str]:
    yield f"| what | {' | '.join(KINDS.values())} |"
    yield f"|---|{'---:|' * len(KINDS)}"
    now, before = (tomllib.loads(path.read_text(encoding="utf-8")) for path in (BUDGETS, BEFORE))
    for name, units in now.items():
        for unit, most in units.items():
            were = before.get(name, {}).get(unit, {})
            cells = " | ".join(f"{were.get(kind, '–')} / {most[kind]}" for kind in KINDS)
            yield f"| {name}: {UNITS[unit]} | {cells} |"


def _section(one: Section, results: Path) -> str:
    path = results / f"{one.name}.json"
    if not path.exists():
        return f"## {one.title}\n{one.workload}\n\n**Not measured yet.**"
    found = json.loads(path.read_text(encoding="utf-8"))
    card = ", ".join(str(value) for value in found["details"]["card"].values())
    return f"{section(f'gpu/{one.name}', found)}\nCard: {card}."


if __name__ == "__main__":
    from gpu import SECTIONS

    PAGE.write_text(page(SECTIONS.values()), encoding="utf-8")
    print(f"written: {PAGE.relative_to(figures.ROOT)}")
