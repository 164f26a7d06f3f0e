"""The library pages run as they stand, and no page links to what is not there."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexperts.methods import registry

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "docs" / "library").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: a file where it has a title, else Python to run, or text that was printed."""

    kind: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(m[1], m[2], m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]
    assert text.count("```") == 2 * len(found), f"{page} has a fenced block that this test does not read"
    return found


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registry: None) -> Path:
    """An empty current folder from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "median_method", raising=False)  # of another test's folder
    return tmp_path


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16's own
@pytest.mark.parametrize("page", LIBRARY, ids=lambda page: page.stem)
def test_a_page_runs_as_it_stands(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    printed = None
    for block in blocks(page):
        if block.title:
            (workplace / block.title).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            capsys.readouterr()
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            printed = capsys.readouterr().out
        else:
            assert block.kind == "text", f"{page}:{block.line}: {block.kind} is not run by this test"
            assert printed == block.text, f"{page}:{block.line}"


def test_there_are_library_pages() -> None:
    assert len(LIBRARY) >= 5


def test_the_python_of_the_readme_runs(
    workplace: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = [block for block in blocks(ROOT / "README.md") if block.kind == "python"]
    for name in ("clinic", "shop"):
        lines = [f"Code case {i}.,{name} {i}" for i in range(6)]
        (workplace / f"{name}.csv").write_text("\n".join(["instruction,response", *lines]), encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(block.text.replace('"smol-moe"', repr(str(tiny_base))), "README.md", "exec"), names)
    assert "'personalized':" in capsys.readouterr().out
    assert [path.name[:5] for path in (workplace / "runs").iterdir()] == ["flex-"]


def test_an_entry_point_as_on_the_page_makes_a_method_known(workplace: Path) -> None:
    files = {block.title: block.text for block in blocks(ROOT / "docs" / "library" / "methods.md") if block.title}
    (workplace / "median_method.py").write_text(files["median_method.py"], encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    installed = workplace / "median_method-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = "".join(f"{name} = {place}\n" for name, place in project["entry-points"]["flexperts.methods"].items())
    (installed / "entry_points.txt").write_text(f"[flexperts.methods]\n{points}")
    registry._find_installed.cache_clear()
    assert "median" in registry.method_names()
    assert registry.method_class("median").__name__ == "MedianLora"


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, anchor) of the page's links within the repository."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_points_to_something(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_the_pages_name_the_study_whose_flex_is_not_the_papers() -> None:
    recipes = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "recipes").glob("study-*.toml")}
    papers = {
        name: (its.get("graft", {}).get("output"), its["training"].get("personal_moments"))
        for name, its in recipes.items()
        if its.get("method", {}).get("name", "flex") == "flex"
    }
    assert [name for name, its in papers.items() if its != ("expert", "fresh")] == ["study-packing-nineteen"]
    for page in ("flex.md", "results/README.md"):
        assert "study-packing-nineteen" in (ROOT / "docs" / page).read_text()
