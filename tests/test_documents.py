"""Pages that show measured numbers show those of the raw files that are committed beside them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from statistics import fmean

import pytest

from flexperts.reports.audit import audit_table, sentences
from flexperts.reports.markdown import markdown_grid, markdown_report

from .scripts import script

ROOT = Path(__file__).parents[1]


def test_the_page_of_slow_silos_shows_the_committed_results() -> None:
    benchmark = script("benchmarks/slow_silos.py")
    found = json.loads((ROOT / "benchmarks" / "results" / "slow_silos.json").read_text())
    assert (ROOT / "docs" / "slow-silos.md").read_text() == benchmark.page(found)
    assert found["curves"].keys() == benchmark.ENTRIES.keys()


def test_times_to_a_loss_are_read_on_lines_between_evaluations() -> None:
    benchmark = script("benchmarks/slow_silos.py")
    curve = [(10.0, 4.0), (20.0, 3.0), (30.0, 3.5), (40.0, 2.0)]
    found = [benchmark.seconds_to(loss, curve) for loss in (5.0, 3.5, 3.0, 2.75, 1.0)]
    assert found == [10.0, 15.0, 20.0, 35.0, None]


def test_a_mixture_has_no_passage_twice_and_none_that_rates_were_chosen_on() -> None:
    """Rows are asked about what follows "Context:" or "Process:"; others are their own passage."""
    one_per_passage = script("benchmarks/prepare_p3.py").one_per_passage
    ask = "Answer the question.\nQuestion: {}?\nContext: {}"
    prompts = [
        ask.format("Who", "Ada wrote."),
        ask.format("What", "Ada wrote. "),
        ask.format("Who", "Bob read."),
        "Sum.",
    ]
    rows = [{"instruction": prompt, "dataset": "x"} for prompt in prompts]
    assert one_per_passage(rows, []) == [rows[0], rows[2], rows[3]]
    assert one_per_passage(rows, [{"instruction": ask.format("When", "Bob read.")}]) == [rows[0], rows[3]]
    process = "Process:\n- rain\n\nQuestion:\nsuppose {} happens, how will it affect b."
    assert len(one_per_passage([{"instruction": process.format(c)} for c in "ab"], [])) == 1


def test_the_page_on_the_audit_shows_the_committed_results() -> None:
    result = json.loads((ROOT / "docs" / "results" / "audit" / "audit.json").read_text())
    assert markdown_grid(audit_table(result)) in (ROOT / "docs" / "results" / "audit.md").read_text()
    assert "succeeds" in sentences(result)[1]


def test_the_page_on_secure_aggregation_shows_the_committed_results() -> None:
    benchmark = script("benchmarks/secure_aggregation.py")
    entries = json.loads((ROOT / "benchmarks" / "results" / "secure_aggregation.json").read_text())["entries"]
    assert len(entries) == len(benchmark.CASES)
    assert benchmark.table(entries) in (ROOT / "docs" / "secure-aggregation.md").read_text()


def test_the_pages_on_speed_and_scale_show_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "performance")
    speed, scale, suite = (script(f"benchmarks/performance/{name}.py") for name in ("page", "scale_page", "suite"))
    missing = [name for name in suite.SCRIPTS if not (ROOT / "benchmarks" / "results" / f"{name}.json").exists()]
    assert missing == []
    assert speed.PAGE.read_text(encoding="utf-8") == speed.page()
    found = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(found)


STUDIES = sorted((ROOT / "docs" / "results").glob("*/comparison.json"))


ROWS = sorted((ROOT / "docs" / "results").glob("*/rows.json.gz"))


def test_there_are_results() -> None:
    assert STUDIES
    assert ROWS


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_studys_tables_are_those_of_its_numbers(path: Path) -> None:
    comparison = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_name("report.md").read_text(encoding="utf-8") == markdown_report(comparison)
    chooses = path.parent.name.startswith(("rates", "search"))
    assert comparison["split"] == ("validation" if chooses else "test")
    assert comparison["title"] == path.parent.name


def test_pages_show_the_studies_numbers() -> None:
    publishing = script("benchmarks/publish_study.py")
    pages = publishing.pages()
    assert pages[ROOT / "docs" / "results" / "README.md"].count("<!-- table ") >= 4
    assert pages[ROOT / "docs" / "comparison.md"].count("| sent per client and round |") == 1
    for page in pages.values():
        assert publishing.filled(page) == page


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.parent.name)
def test_a_studys_rows_come_to_its_numbers(path: Path) -> None:
    """Of ROUGE-L, whose mean is plain: over rows, clients and seeds."""
    rows = json.loads(gzip.decompress(path.read_bytes()))
    entries = json.loads(path.with_name("comparison.json").read_text(encoding="utf-8"))["entries"]
    assert set(rows) == {entry["name"] for entry in entries}
    for entry in entries:
        found = entry["scores"][entry["own_state"]]["own"]["rouge_l"]
        seeds = [
            fmean(fmean(client[entry["own_state"]]["rouge_l"]) for client in seed.values())
            for seed in rows[entry["name"]].values()
        ]
        assert seeds == pytest.approx(found["seeds"], abs=1e-3)
