"""What pages say of cut answers, of the words that are counted, of scores that are no numbers, of rows shown."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from flexperts.reports.html import html_report
from flexperts.reports.markdown import markdown_report
from flexperts.reports.notes import main_note, tokenizer_words
from flexperts.reports.tables import tables

Comparison = dict[str, Any]
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds and show none of this."""
    monkeypatch.setattr("flexperts.reports.html._plots", lambda comparison: defaultdict(list))
    monkeypatch.setattr("flexperts.reports.html.routing_plots", lambda comparison: [])


def counted(whole: Comparison, cut: int, longer: int) -> Comparison:
    for entry in whole["entries"]:
        client = {"rows": 60, "longer_references": longer, "cut": dict.fromkeys(entry["scores"], cut)}
        entry["answers"] = {"max_new_tokens": [32], "clients": dict.fromkeys(whole["clients"], client)}
    return whole


@pytest.mark.parametrize(("cut", "longer"), [(7, 0), (0, 3), (7, 3)])
def test_cut_answers_are_counted_by_state_and_client(whole: Comparison, cut: int, longer: int) -> None:
    table = tables(counted(whole, cut, longer))["answers"]
    heads = [column.text for column in table.header]
    for row in table.rows:
        cells = dict(zip(heads, (cell.text for cell in row), strict=True))
        assert cells["limit, tokens"] == "32"
        assert cells["longer references"] == f"{2 * longer} of 120"
        assert cells["zero-shot (cut, all clients)"] == f"{2 * cut} of 120"
        assert [text for head, text in cells.items() if head.startswith("shop (")] == [f"{cut} of 60"]
    fedavg = next(row for row in table.rows if row[0].text == "fedavg")
    assert fedavg[heads.index("personalized (cut, all clients)")].text == "–"
    note = main_note(whole)
    assert ("Answers cut at evaluation.max_new_tokens: flex 14 of 120" in note) == bool(cut)
    assert ("Some references are longer than this limit." in note) == bool(longer)
    assert "Answers that were cut" in html_report(whole)
    assert "## Answers that were cut" in markdown_report(whole)


def test_where_nothing_is_cut_nothing_is_said(whole: Comparison) -> None:
    assert "answers" not in tables(counted(whole, 0, 0))
    assert "cut at" not in main_note(whole)


def test_the_tokenizer_is_named(whole: Comparison) -> None:
    assert tokenizer_words(whole) == ""  # a comparison of an earlier version
    for entry in whole["entries"]:
        entry["rouge_tokenizer"] = "unicode-words-1"
    for page in (html_report(whole), markdown_report(whole)):
        assert "ROUGE-L counts words as unicode-words-1 does." in page


@pytest.mark.parametrize("other", ["rouge-score", "unicode-words-2", "rouge-score, unicode-words-1"])
def test_scores_of_different_words_are_said_not_to_compare(whole: Comparison, other: str) -> None:
    for entry, name in zip(whole["entries"], (other, "unicode-words-1", "unicode-words-1"), strict=True):
        entry["rouge_tokenizer"] = name
    said = tokenizer_words(whole)
    assert "was computed with different tokenizers" in said
    assert f"{other} in {whole['entries'][0]['name']}" in said
    for page in (html_report(whole), markdown_report(whole)):
        assert "these scores cannot be compared" in page


def test_one_entry_of_runs_with_different_words_is_said_too(single: Comparison) -> None:
    single["entries"][0]["rouge_tokenizer"] = "rouge-score, unicode-words-1"
    assert "cannot be compared" in tokenizer_words(single)


def test_scores_that_are_no_numbers_are_dashes_with_the_reason(whole: Comparison) -> None:
    entry = whole["entries"][0]
    entry["not_finite"] = {"shop": {"personalized": "training has diverged"}}
    for kind in ("rouge_l", "nll"):
        found = entry["scores"]["personalized"]["own"][kind]
        found |= {"mean": None, "std": None, "seeds": [None, 1.0, 1.0]}
        found["clients"]["shop"] = {"mean": None, "std": None}
    entry["against"] = {}
    made = tables(whole)
    row = next(row for row in made["main"].rows if row[0].text.startswith("flex"))
    assert row[2].text == "–"
    by_client = next(row for row in made["clients-nll"].rows if row[0].text == "flex")
    assert by_client[2].value is not None
    assert [cell.text for cell in by_client[3:]] == ["–", "–"]
    for page in (html_report(whole), markdown_report(whole)):
        assert "No score, and no mean that includes it: flex, shop, personalized: training has diverged." in page


@pytest.mark.parametrize("shown", [{}, {"clinic": []}, None])
def test_a_page_without_rows_has_no_warning(whole: Comparison, shown: Any) -> None:
    whole["examples"] = shown
    for page in (html_report(whole), markdown_report(whole)):
        assert "This page holds rows" not in page


def test_a_page_with_rows_says_so_first_and_names_the_silos_as_text(whole: Comparison) -> None:
    whole["examples"] = {"<b>a*": whole["examples"]["clinic"]}
    page, text = html_report(whole), markdown_report(whole)
    body = page[page.index("<body>") :]
    assert re.search(r'<p class="warning" role="note">This page holds rows .*&lt;b&gt;a\* \(1\)', body)
    assert body.index('class="warning"') < body.index("<h1>")
    assert text.splitlines()[2].startswith("> **This page holds rows of these silos")
    assert r"&lt;b&gt;a\* (1)" in text.splitlines()[2]


EARLIER = [path for path in sorted(RESULTS.glob("*/comparison.json")) if "rouge_tokenizer" not in path.read_text()]


def test_there_are_comparisons_of_earlier_versions() -> None:
    assert EARLIER


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.parent.name)
def test_comparisons_of_earlier_versions_are_still_read(path: Path) -> None:
    """Without what is new in them, and with nothing said of it."""
    comparison = json.loads(path.read_text(encoding="utf-8"))
    assert "answers" not in tables(comparison)
    page = html_report(comparison)
    assert page.startswith("<!doctype html>")
    assert "counts words" not in page
