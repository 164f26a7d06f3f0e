"""Write docs/performance.md from the suite's JSON files: every number on the page is from them.

python benchmarks/performance/page.py            # after single scripts; the suite does it itself
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import RESULTS, ROOT, Figure, target
from suite import SCRIPTS

PAGE = ROOT / "docs" / "performance.md"
_VERDICTS = {True: "reached", False: "**missed**", None: ""}


def page(results: Path = RESULTS) -> str:
    """Return the page; a benchmark without a file is left out."""
    template = Path(__file__).with_name("performance.template.md").read_text(encoding="utf-8")
    found = {name: _read(results / f"{name}.json") for name in SCRIPTS if (results / f"{name}.json").exists()}
    return template.format(
        minutes=round(sum(one["seconds"] for one in found.values()) / 60),
        sections="\n\n".join(section(name, one) for name, one in found.items()),
    )


def section(name: str, found: dict[str, Any]) -> str:
    """Return one benchmark's section."""
    figures = [Figure(**values) for values in found["figures"]]
    rows = [_row(figure) for figure in figures]
    machine = f"{found['environment']['cores']} cores of an {found['environment']['processor']}"
    torch = found["environment"]["packages"]["torch"]
    return "\n".join(
        [
            f"## {found['title']}",
            found["workload"],
            "",
            "| what | measured | target | | what limits it |",
            "|---|---:|---|---|---|",
            *rows,
            "",
            *(note + "\n" for note in found["notes"]),
            f"`{found['command']}`, {found['seconds']:.0f} s; commit {found['commit']}, {found['date']}, "
            f"{machine}, torch {torch}; [raw numbers](../benchmarks/results/{name}.json).",
        ]
    )


def _row(figure: Figure) -> str:
    unit = "" if figure.unit == "ratio" else f" {figure.unit}"
    cells = (
        figure.name,
        f"{figure.value:,.4g}{unit}" if abs(figure.value) < 1000 else f"{figure.value:,.0f}{unit}",
        target(figure),
        _VERDICTS[figure.met],
        figure.limit,
    )
    return "| " + " | ".join(cells) + " |"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
