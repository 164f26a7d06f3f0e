"""The output of every benchmark of the suite: figures, their targets, and where and how they were measured."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexperts.environment import environment
from flexperts.files import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Figure:
    """One number of the performance page.

    Args:
        name: What was measured, on which workload.
        value: The median, unless the name says otherwise.
        unit: "ratio", "s", "%", "tokens/s", ...
        at_most: Target; None if there is none, or it is ``at_least``.
        at_least: Likewise.
        limit: The present limit, in a sentence.
    """

    name: str
    value: float
    unit: str = "ratio"
    at_most: float | None = None
    at_least: float | None = None
    limit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least


@dataclass
class Benchmark:
    """One script of the suite, from its command line to its file.

    Args:
        name: The script's, and its file's under ``benchmarks/results``.
        title: Heading on the page.
        workload: What was run, in one or two sentences; shown under the heading.
        notes: Sentences under the table: fairness, what was not measured.
    """

    name: str
    title: str
    workload: str
    notes: Sequence[str] = ()
    started: float = field(default_factory=time.perf_counter)

    def write(self, out: Path, figures: Sequence[Figure], details: Any, *, tell: bool = True) -> None:
        """Print the figures if ``tell``, and write ``OUT/NAME.json``."""
        for figure in figures if tell else ():
            print(line(figure))
        found = {
            "title": self.title,
            "workload": self.workload,
            "notes": list(self.notes),
            "figures": [asdict(figure) for figure in figures],
            "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - self.started, 1),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "environment": environment(),
            "details": details,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{self.name}.json", found)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option of all scripts, ``--out``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return made


def line(figure: Figure) -> str:
    """Return a figure as the terminal shows it."""
    verdict = {True: "reached", False: "MISSED", None: ""}[figure.met]
    return f"{figure.name}: {figure.value:.4g} {figure.unit}  {target(figure)}  {verdict}".rstrip()


def target(figure: Figure) -> str:
    """Return a figure's target in words."""
    if figure.at_most is not None:
        return f"at most {figure.at_most:g}"
    return "" if figure.at_least is None else f"at least {figure.at_least:g}"


def commit() -> str:
    """Return the commit that is measured, with a mark if the measured code differs from it."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/performance")
    return (_git("rev-parse", "--short", "HEAD") or "not a git checkout") + (", with changes" if changed else "")


def _git(*arguments: str) -> str:
    told = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()
