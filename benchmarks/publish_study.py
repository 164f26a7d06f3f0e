"""Put a finished comparison under docs/results: its numbers, its tables, every row's scores; and fill the pages.

    python benchmarks/publish_study.py runs/study-silos      # a new study, or a new state of one
    python benchmarks/publish_study.py                       # only what is made from the committed numbers

A study's folder holds comparison.json and report.md, as ``flexperts compare`` writes them, and rows.json.gz:
entry -> seed -> client -> state -> score -> one number per scored row, in the order of the client's rows, no texts.

Pages under docs hold tables made from these numbers, each between two comments, such as
``<!-- table study-p3: rouge_l nll -->`` and ``<!-- end -->``: a study's folder, and columns out of ``COLUMNS``;
``<!-- rounds study-p3: nll -->``: a score after every round; ``<!-- silos study-p3: nll -->``: a score in every
silo, mean over seeds; or ``<!-- report study-p3: floor -->``: a table of the report, by its key.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexperts.files import write_json, write_text
from flexperts.reports.cells import Cell, bounded, interval, number, size
from flexperts.reports.markdown import markdown_grid, markdown_report
from flexperts.reports.reading import (
    Comparison,
    Entry,
    ability,
    against,
    each_of,
    mean,
    ordered,
    over_silos,
    own,
    stat,
    trained_state,
    verdict,
)
from flexperts.reports.score_tables import DIGITS
from flexperts.reports.silo_tables import harmed, silo_table
from flexperts.reports.tables import tables
from flexperts.studies.collect import collect_comparison
from flexperts.studies.finished import Finished, read_claim

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
SAMPLES = 3
"""Rows of each silo that a study of the shipped silos shows; others' data is not passed on."""
_TABLE = re.compile(
    r"(?P<head><!-- (?P<kind>table|rounds|silos|report) (?P<study>[^ :]+): (?P<wanted>[^>]+) -->\n).*?"
    r"(?P<end><!-- end -->)",
    re.DOTALL,
)


def _difference(metric: str) -> Callable[[Comparison, Entry], str]:
    def text(comparison: Comparison, entry: Entry) -> str:
        shown = interval(against(entry, metric), DIGITS[metric]).text
        significant = verdict(comparison, entry, metric) in ("better", "worse")
        return f"**{shown}**" if significant else shown

    return text


def _both(state: str | None, place: str) -> Callable[[Comparison, Entry], str]:
    """Return what shows ROUGE-L and NLL of a state (None: the entry's own) on some rows."""

    def text(_: Comparison, entry: Entry) -> str:
        found = {m: mean(stat(entry, state or entry["own_state"], place, m)) for m in ("rouge_l", "nll")}
        return f"{number(found['rouge_l'], 1).text}, {number(found['nll'], 2).text}"

    return text


def _megabytes(way: str) -> Callable[[Comparison, Entry], str]:
    """Return what shows a client's megabytes in a whole run, one way, and their share of the reference's."""

    def text(comparison: Comparison, entry: Entry) -> str:
        (reference,) = [one for one in comparison["entries"] if one["name"] == comparison["reference"]]
        own, whole = (moved(one, len(comparison["clients"]))[way] for one in (entry, reference))
        return f"{own / 1e6:.2f}, 1/{whole / own:.1f}" if own else "0"

    return text


def _link(rate: float) -> Callable[[Comparison, Entry], str]:
    """Return what shows the seconds of a client's bytes, both ways, on a link of so many bits a second."""
    return lambda c, entry: f"{8 * sum(moved(entry, len(c['clients'])).values()) / rate:.2f} s"


def _text(cell: Callable[[Entry], Cell]) -> Callable[[Comparison, Entry], str]:
    return lambda _, entry: cell(entry).text


def _newcomers(entry: Entry) -> Cell:
    """Return the mean NLL of newcomers in the last state that they have."""
    states = [its["nll"] for its in (entry.get("newcomers") or {}).values() if mean(its["nll"]) is not None]
    return number(mean(states[-1]) if states else None, 3)


def _general(entry: Entry) -> Mapping[str, Any] | None:
    return ability(entry, trained_state(entry), "nll")


COLUMNS: dict[str, tuple[str, Callable[[Comparison, Entry], str]]] = {
    "rouge_l": ("ROUGE-L", _text(lambda e: number(mean(own(e, "own", "rouge_l")), 1))),
    "rouge_l_difference": ("to the reference", _difference("rouge_l")),
    "nll": ("NLL", _text(lambda e: number(mean(own(e, "own", "nll")), 3))),
    "nll_difference": ("to the reference", _difference("nll")),
    "settings": (
        "settings",
        lambda _, e: ", ".join(f"`{setting}`" for setting in e["settings"] if setting != "method.options={}"),
    ),
    "global": ("global model: ROUGE-L, NLL", _both("global", "own")),
    "personalized": ("personalized: ROUGE-L, NLL", _both("personalized", "own")),
    "nll_global": ("NLL of the global model", _text(lambda e: number(mean(stat(e, "global", "own", "nll")), 3))),
    "others": ("others' rows: ROUGE-L, NLL", _both(None, "others")),
    "general_change": (
        "general NLL, minus the base's",
        _text(lambda e: interval(_general(e), 2)),
    ),
    "received": ("received", _text(lambda e: size(e["bytes"]["downlink_per_client_per_round"]))),
    "sent": ("sent", _text(lambda e: size(e["bytes"]["uplink_per_client_per_round"]))),
    "up": ("MB up, of the reference's", _megabytes("up")),
    "down": ("MB down, of the reference's", _megabytes("down")),
    "link_10": ("10 Mbit/s", _link(10e6)),
    "link_1000": ("1 Gbit/s", _link(1e9)),
    "personal": ("personal parameters", _text(lambda e: number(e["parameters"]["personal"], 0))),
    "nll_iqm": ("interquartile mean of NLL", _text(lambda e: bounded(over_silos(e, "nll").get("iqm"), 3))),
    "nll_improvement": ("P(better)", _text(lambda e: bounded(over_silos(e, "nll").get("improvement"), 2))),
    "nll_worst": ("NLL, worst tenth of silos", _text(lambda e: number(over_silos(e, "nll").get("worst_tenth"), 3))),
    "nll_harmed": ("harmed silos, %", _text(lambda e: harmed(over_silos(e, "nll").get("harmed")))),
    "nll_newcomers": ("newcomers' NLL", _text(_newcomers)),
    "seeds": ("seeds", lambda _, e: str(len(e["seeds"]))),
}
"""A column's name on the page -> its heading, and the text of an entry; significant differences are bold."""


def moved(entry: Entry, clients: int) -> dict[str, float]:
    """Return the bytes of a client in all messages of a run, up and down, mean over clients and seeds.

    Args:
        entry: The entry.
        clients: Number of a run's clients; a comparison knows them where ``evaluation.clients`` leaves none out.
    """
    sent = entry["bytes"]
    return {
        "up": sent["uplink_total"] / clients,
        "down": (sent["downlink_total"] + sent["evaluation_total"]) / clients,
    }


def table(comparison: Comparison, columns: str) -> str:
    """Return a Markdown table of entries: best ROUGE-L first, or lowest NLL first where ROUGE-L is not shown."""
    names, entries = columns.split(), ordered(comparison)
    chosen = [COLUMNS[name] for name in names]
    headings = [f"sent {each_of(comparison)}" if name == "sent" else COLUMNS[name][0] for name in names]
    if "rouge_l" not in names:
        entries.sort(key=lambda entry: mean(own(entry, "own", "nll")) or math.inf)
    lines = [[entry["name"], *(text(comparison, entry) for _, text in chosen)] for entry in entries]
    return _markdown(headings, lines)


def rounds(comparison: Comparison, metric: str) -> str:
    """Return a Markdown table of a score by round, mean over seeds: own states, then the others' global ones."""
    entries = ordered(comparison)
    wanted = [(e["name"], e, trained_state(e)) for e in entries]
    wanted += [(f"{e['name']}: global state", e, "global") for e in entries if trained_state(e) != "global"]
    found = [(name, (e["curves"].get(state) or {}).get(metric)) for name, e, state in wanted]
    curves = {name: dict(zip(its["rounds"], its["mean"], strict=True)) for name, its in found if its}
    numbers = sorted({i for curve in curves.values() for i in curve})
    lines = [[name, *(number(curve.get(i), 2).text for i in numbers)] for name, curve in curves.items()]
    return _markdown([str(i) for i in numbers], lines)


def silos(comparison: Comparison, metric: str) -> str:
    """Return a Markdown table of a score by silo, mean over seeds: a column per entry, the best of a row bold."""
    return markdown_grid(silo_table(comparison, metric), grouped=False) + "\n"


def report(comparison: Comparison, key: str) -> str:
    """Return a table of the report, without its note and groups of columns."""
    return markdown_grid(tables(comparison)[key], grouped=False) + "\n"


def _markdown(headings: list[str], lines: list[list[str]]) -> str:
    head = [["entry", *headings], ["---", *["---:"] * len(headings)]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def pages() -> dict[Path, str]:
    """Return the pages that hold tables of studies, with their texts."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
    return {path: text for path, text in texts.items() if _TABLE.search(text)}


def filled(page: str) -> str:
    """Return the page with every table made from its study's numbers."""

    def fill(found: re.Match[str]) -> str:
        numbers = json.loads((RESULTS / found["study"] / "comparison.json").read_text(encoding="utf-8"))
        make = {"table": table, "rounds": rounds, "silos": silos, "report": report}[found["kind"]]
        return f"{found['head']}{make(numbers, found['wanted'])}{found['end']}"

    return _TABLE.sub(fill, page)


def row_scores(out: Path) -> dict[str, Any]:
    """Return entry -> seed -> client -> state -> score -> one number per row, of a comparison's finished runs."""
    entries = [Finished.read(out, name, settings) for name, settings in read_claim(out)["entries"].items()]
    return {
        e.name: {s: {c: _by_state(r) for c, r in seed.items()} for s, seed in e.predictions.items()}
        for e in entries
        if e.runs
    }


def _by_state(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    return {
        state: {score: [_short(row["scores"][state][score]) for row in rows] for score in scores}
        for state, scores in rows[0]["scores"].items()
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def publish(out: Path) -> None:
    """Write a comparison's numbers and rows into the folder of its name."""
    folder = RESULTS / out.resolve().name
    shipped = tomllib.loads(read_claim(out)["recipe"])["data"].get("silos")
    comparison = collect_comparison(out, samples=SAMPLES if shipped else 0)
    write_json(folder / "comparison.json", comparison, indent=None)
    packed = gzip.compress(json.dumps(row_scores(out), separators=(",", ":")).encode(), mtime=0)
    (folder / "rows.json.gz").write_bytes(packed)


def main() -> None:
    """Publish a comparison, if one is named, and write what is made from all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="directory of a finished comparison")
    wanted = parser.parse_args()
    if wanted.out:
        publish(wanted.out)
    for path in sorted(RESULTS.glob("*/comparison.json")):
        write_text(path.with_name("report.md"), markdown_report(json.loads(path.read_text(encoding="utf-8"))))
    for path, text in pages().items():
        write_text(path, filled(text))


if __name__ == "__main__":
    main()
