"""The page: complete in itself, escaped, the same bytes every time, and no more than there is to show."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from flexperts.reports.html import html_report
from flexperts.reports.markdown import escaped, markdown_report

Comparison = dict[str, Any]
EVIL = '<script>alert(1)</script> | "quoted"\n# head & [a](http://x.example) ![b](http://y.example) $x_1$ `c`'
VOID = {"meta", "link", "img", "br", "hr", "input", "image", "use", "path"}


class Page(HTMLParser):
    """Reads tags and attributes, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page._open == []
    return page


def test_nothing_is_loaded_and_nothing_runs(whole: Comparison) -> None:
    text = html_report(whole)
    page = parsed(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert any(m.get("name") == "viewport" for m in metas)
    assert any("default-src 'none'" in str(m.get("content")) for m in metas)


def test_what_points_into_the_page_finds_its_target_once(whole: Comparison) -> None:
    text = html_report(whole)
    page = parsed(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = {str(a["href"])[1:] for _, a in page.tags if str(a.get("href", "")).startswith("#")}
    used |= {str(a["aria-labelledby"]) for _, a in page.tags if "aria-labelledby" in a}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert len(used) > 20
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_data_cannot_become_markup(whole: Comparison) -> None:
    """Generations, instructions, names, recipe: wherever text comes from outside."""
    tags = {tag for tag, _ in parsed(html_report(whole)).tags}
    whole["title"] = whole["recipe"] = whole["entries"][1]["name"] = EVIL
    whole["entries"][2]["settings"] = [EVIL]
    row = whole["examples"]["clinic"][0]
    row |= {"instruction": EVIL, "context": EVIL, "response": EVIL, "answers": {EVIL: EVIL}}
    whole["examples"] = {EVIL: [row]}
    page = parsed(html_report(whole))
    assert {tag for tag, _ in page.tags} <= tags
    assert page.text.count("alert(1)") > 8
    assert EVIL in page.text, "a generation keeps its lines"


def test_markdown_stays_text(whole: Comparison) -> None:
    whole["entries"][1]["name"] = whole["title"] = EVIL
    whole["recipe"] = "a = '''\n```\n# not a heading\n'''\n"
    whole["examples"] = {"clinic": [{"instruction": EVIL, "context": "", "response": "", "answers": {"x": EVIL}}]}
    text = markdown_report(whole)
    assert "<script" not in text
    assert "](http" not in text.replace("\\](", "")
    assert "````toml\n" in text
    assert len(re.findall(r"^#{1,3} ", text.split("````")[0], flags=re.MULTILINE)) == 1 + 11 + 3
    widths = {
        len(re.split(r"(?<!\\)\|", line))
        for line in text.split("## ROUGE-L by client")[0].splitlines()
        if line.startswith("|")
    }
    assert len(widths) == 1, "a name's bar or line opened a cell"


def test_plain_names_stay_readable_in_markdown() -> None:
    assert escaped("fedavg_experts +1.0 [0.2, 1.8]") == "fedavg_experts +1.0 [0.2, 1.8]"
    assert escaped("_a_ *b* |c|") == r"\_a\_ \*b\* \|c\|"


def test_the_same_comparison_gives_the_same_bytes(whole: Comparison, tmp_path: Path) -> None:
    """In this process twice, and in others whose hashes of strings differ."""
    before, settings = copy.deepcopy(whole), dict(mpl.rcParams)
    first = html_report(whole)
    assert html_report(whole) == first
    assert whole == before
    assert dict(mpl.rcParams) == settings
    (tmp_path / "c.json").write_text(json.dumps(whole), encoding="utf-8")
    code = (
        "import json, sys; from flexperts.reports.html import html_report;"
        "sys.stdout.write(html_report(json.load(open(sys.argv[1]))))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "c.json")],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode() == first


def headings(text: str) -> list[str]:
    return re.findall(r"<h2 id=\"(\w+)\"", text)


def test_every_part_has_its_section_and_its_line_in_the_contents(whole: Comparison) -> None:
    text = html_report(whole)
    wanted = ["comparison", "clients", "curves", "ability", "cost", "routing", "examples", "setup"]
    assert headings(text) == wanted
    assert re.findall(r"<li><a href=\"#(\w+)\"", text) == wanted
    # 4 of scores, 2 of bytes, 3 of curves, 3 that drift; for each entry 2 clients and a scale; gates of two.
    assert text.count("<svg") == 4 + 2 + 3 + 3 + 3 * len(whole["entries"]) + 2


def test_missing_parts_are_left_out(single: Comparison) -> None:
    text = html_report(single)
    parsed(text)
    assert headings(text) == ["comparison", "clients", "cost", "setup"]
    assert "<svg" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize("part", ["against", "curves", "routing", "routing_rounds", "selection", "peak_memory"])
def test_any_one_part_may_be_missing(whole: Comparison, part: str) -> None:
    for entry in whole["entries"]:
        entry[part] = {} if part == "curves" else None
    parsed(html_report(whole))
    assert markdown_report(whole)


def test_nothing_finished_yet(single: Comparison) -> None:
    single["entries"][0] |= {"scores": {}, "seeds": []}
    assert "No entry has a score yet." in html_report(single)
    assert "No entry has a score yet." in markdown_report(single)
