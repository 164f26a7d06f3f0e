"""Write docs/gpu.md from the card tier's files: what was measured on a card, and plainly what was not.

python benchmarks/performance/gpu_page.py            # gpu.py does it itself
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import figures
from gpu_card import Section
from page import section

RESULTS = figures.RESULTS / "gpu"
PAGE = figures.ROOT / "docs" / "gpu.md"


def page(sections: Iterable[Section], results: Path = RESULTS) -> str:
    """Return the page; a section without a file says so."""
    template = Path(__file__).with_name("gpu.template.md").read_text(encoding="utf-8")
    return template.format(sections="\n\n".join(_section(one, results) for one in sections))


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
