"""Tables over silos: readable with nineteen, the right end marked, and left out where nothing is recorded."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest

from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.tables import tables

from ..scripts import script  # noqa: TID252

Comparison = dict[str, Any]
NINETEEN = [f"silo-{i:02}" for i in range(19)]


def with_silos(comparison: Comparison) -> Comparison:
    """Add measures as a collection computes them; every number is another one."""
    for i, entry in enumerate(comparison["entries"]):
        compared = entry["name"] != comparison["reference"]
        made = {
            "iqm": {"value": 1.5 + i, "low": 1.25 + i, "high": 1.75 + i},
            "std": 0.5 - i / 8,
            "worst": {"client": comparison["clients"][i], "value": 4.0 + i},
            "worst_tenth": 3.0 + i,
            "improvement": {"value": 0.25 * i, "low": 0.1 * i, "high": 0.3 * i} if compared else None,
            "harmed": {"count": i, "silos": 19, "value": i / 19, "low": 0.01, "high": 0.4} if compared else None,
        }
        entry["silos"] = {"rouge_l": made, "nll": made}
    return comparison


@pytest.fixture
def nineteen(made: Callable[..., Comparison]) -> Comparison:
    return with_silos(made(["flex", "fedavg", "local"], NINETEEN, 3))


@pytest.mark.parametrize("metric", ["rouge_l", "nll"])
def test_of_many_silos_each_is_a_row_with_its_best_entry_marked(nineteen: Comparison, metric: str) -> None:
    table = tables(nineteen)[f"clients-{metric}"]
    assert [row[0].text for row in table.rows] == [*NINETEEN, "mean"]
    names = [column.name for column in table.header[1:]]
    assert sorted(names) == ["fedavg", "flex", "local"]
    by_name = {entry["name"]: entry for entry in nineteen["entries"]}
    found = {n: by_name[n]["scores"][by_name[n]["own_state"]]["own"][metric] for n in names}
    better = min if metric == "nll" else max
    for client, row in zip([*NINETEEN, "mean"], table.rows, strict=True):
        values = {n: (f if client == "mean" else f["clients"][client])["mean"] for n, f in found.items()}
        assert [cell.value for cell in row[1:]] == [values[n] for n in names]
        assert [n for n, cell in zip(names, row[1:], strict=True) if cell.best] == [better(values, key=values.get)]
    assert "The last row is the plain mean" in table.note
    assert "best mean of its row" in table.note
    lines = markdown_report(nineteen).splitlines()
    assert max(len(line) for line in lines if line.startswith("| silo-07 |")) < 80
    assert '<th scope="row">silo-07</th>' in html_report(nineteen)


def test_of_few_silos_each_is_a_column_with_its_spread(whole: Comparison) -> None:
    table = tables(whole)["clients-nll"]
    assert [column.name for column in table.header] == ["entry", "own state", "clinic", "shop", "mean"]
    assert all("±" in cell.text for row in table.rows for cell in row[2:])


def test_a_silo_without_a_score_has_a_dash(nineteen: Comparison) -> None:
    flex = nineteen["entries"][0]["scores"]["personalized"]["own"]["nll"]
    flex["mean"] = flex["clients"]["silo-03"]["mean"] = None
    table = tables(nineteen)["clients-nll"]
    place = [column.name for column in table.header].index("flex")
    assert [row[0].text for row in table.rows if row[place].text == "–"] == ["silo-03", "mean"]


def test_robust_measures_and_what_they_are_against(nineteen: Comparison) -> None:
    table = tables(nineteen)["robust"]
    assert [column.text for column in table.header[2:4]] == [
        "IQM [95 %] (ROUGE-L)",
        "P(better than flex) [95 %] (ROUGE-L)",
    ]
    rows = {row[0].text: [cell.text for cell in row] for row in table.rows}
    assert rows["flex"][4:] == ["1.500 [1.250, 1.750]", "–"]
    assert rows["local"][2:] == ["3.5 [3.2, 3.8]", "0.50 [0.20, 0.60]", "3.500 [3.250, 3.750]", "0.50 [0.20, 0.60]"]
    best = {row[0].text: (row[2].best, row[4].best) for row in table.rows}
    assert best == {"flex": (False, True), "fedavg": (False, False), "local": (True, False)}
    assert "test rows are drawn with replacement, the same for all entries, and in every silo" in table.note


def test_the_spread_names_the_worst_silo_and_counts_the_harmed_ones(nineteen: Comparison) -> None:
    table = tables(nineteen)["spread"]
    rows = {row[0].text: [cell.text for cell in row] for row in table.rows}
    nll = {e["name"]: e["scores"][e["own_state"]]["own"]["nll"]["mean"] for e in nineteen["entries"]}
    assert rows["fedavg"][2] == f"{nll['fedavg']:.3f}"
    assert rows["fedavg"][3:] == ["0.375", "silo-01", "5.000", "4.000", "1 of 19: 5.3 [1.0, 40.0]"]
    assert rows["flex"][-1] == "–"
    assert [row[0].text for row in table.rows if row[5].best] == ["flex"]
    assert [row[0].text for row in table.rows if row[3].best] == ["local"]
    assert "Wilson" in table.note


def test_a_single_run_speaks_of_no_reference(single: Comparison) -> None:
    entry = with_silos(single)["entries"][0]
    for found in entry["silos"].values():
        found["iqm"] |= {"low": None, "high": None}
    made = tables(single)
    assert [column.name for column in made["robust"].header] == ["entry", "own state"] + ["IQM [95 %]"] * 2
    assert [cell.text for cell in made["robust"].rows[0][2:]] == ["1.5", "1.500"]
    assert "bootstrap" not in made["robust"].note
    assert "Harmed" not in made["spread"].note


def test_older_comparisons_have_no_such_tables(whole: Comparison) -> None:
    assert not {"robust", "spread"} & tables(whole).keys()


def test_a_study_page_has_a_table_by_silo(nineteen: Comparison) -> None:
    publishing = script("benchmarks/publish_study.py")
    lines = publishing.silos(nineteen, "nll").splitlines()
    assert len(lines) == 2 + 19 + 1
    assert set(lines[0].strip("| ").split(" | ")) == {"silo", "flex", "fedavg", "local"}
    assert all(line.count("**") == 2 for line in lines[2:])
    own = [e["scores"][e["own_state"]]["own"]["nll"]["clients"]["silo-18"]["mean"] for e in nineteen["entries"]]
    assert f"**{min(own):.3f}**" in lines[20]
    assert fmean(own) != min(own)
    table = publishing.table(nineteen, "nll_iqm nll_improvement nll_worst nll_harmed")
    row = next(line for line in table.splitlines() if line.startswith("| fedavg |"))
    assert row == "| fedavg | 2.500 [2.250, 2.750] | 0.25 [0.10, 0.30] | 4.000 | 1 of 19: 5.3 [1.0, 40.0] |"
    assert publishing._TABLE.search("<!-- silos study: nll -->\n<!-- end -->")["kind"] == "silos"


def test_curves_of_a_study_page_stand_under_their_rounds(nineteen: Comparison) -> None:
    """An entry with more rounds, such as finish has, or without this score."""
    publishing = script("benchmarks/publish_study.py")
    for entry in nineteen["entries"]:
        entry["curves"] = {publishing.trained_state(entry): {"nll": {"rounds": [2, 4], "mean": [2.0, 1.5]}}}
    nineteen["entries"][0]["curves"]["global"] = {"nll": {"rounds": [4, 6], "mean": [3.0, 2.5]}}
    nineteen["entries"][1]["curves"] = {}
    lines = publishing.rounds(nineteen, "nll").splitlines()
    assert lines[0] == "| entry | 2 | 4 | 6 |"
    assert sorted(lines[2:]) == [
        "| flex | 2.00 | 1.50 | – |",
        "| flex: global state | – | 3.00 | 2.50 |",
        "| local | 2.00 | 1.50 | – |",
    ]


def test_a_study_page_has_a_table_of_the_report_and_what_newcomers_get(nineteen: Comparison) -> None:
    publishing = script("benchmarks/publish_study.py")
    lines = publishing.report(nineteen, "spread").splitlines()
    assert lines[0].startswith("| entry | own state | mean | std over silos | worst silo |")
    assert len(lines) == 2 + 3
    for entry in nineteen["entries"]:
        entry["newcomers"] = {"zero_shot": {"nll": {"mean": 4.0}}}
    nineteen["entries"][0]["newcomers"]["personalized"] = {"nll": {"mean": 2.5}}
    nineteen["entries"][1]["newcomers"]["personalized"] = {"nll": {"mean": None}}
    del nineteen["entries"][2]["newcomers"]
    rows = publishing.table(nineteen, "nll_newcomers").splitlines()
    assert {"| flex | 2.500 |", "| fedavg | 4.000 |", "| local | – |"} < {*rows}
