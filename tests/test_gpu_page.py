"""The card tier without a card: its sections run on a CPU in small shapes, and its page is the committed files'."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tier() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks" / "performance")
        import gpu

        return gpu


def test_the_page_shows_the_committed_results(tier: ModuleType) -> None:
    assert tier.gpu_page.PAGE.read_text(encoding="utf-8") == tier.gpu_page.page(tier.SECTIONS.values())


def test_a_section_without_a_file_says_that_it_was_not_measured(tier: ModuleType, tmp_path: Path) -> None:
    shown = tier.gpu_page.page(tier.SECTIONS.values(), tmp_path)
    assert shown.count("**Not measured yet.**") == len(tier.SECTIONS) > 10


def test_figures_of_before_stand_beside_those_of_now(tier: ModuleType) -> None:
    shown = tier.gpu_page.PAGE.read_text(encoding="utf-8")
    assert "| flex: a training step of one micro-batch | 768 / 761 | 2 / 1 | 3 / 3 | 0 / 0 |" in shown
    now, before = (tomllib.loads(path.read_text()) for path in (tier.gpu_page.BUDGETS, tier.gpu_page.BEFORE))
    for name, units in before.items():
        assert units.keys() <= now[name].keys()


@pytest.mark.parametrize("name", ["attention", "turn", "evaluation", "sampling", "families"])
def test_a_section_finds_finite_figures_that_a_cpu_can_reach(tier: ModuleType, name: str) -> None:
    card = tier.Card(torch.device("cpu"), tiny=True)
    found = list(tier.SECTIONS[name].measure(card))
    assert found
    assert [figure.name for figure in found if figure.met is False] == []


def test_a_failed_section_keeps_its_figures_and_does_not_stop_the_next(
    tier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(card: object) -> object:
        yield tier.Figure("before", 1.0)
        raise ValueError("broken")

    def works(card: object) -> object:
        yield tier.Figure("after", 2.0, at_most=1)

    sections = [tier.gpu_page.Section(f.__name__, f.__name__, "", 5, f) for f in (breaks, works)]
    monkeypatch.setattr(tier, "SECTIONS", {one.name: one for one in sections})
    monkeypatch.setattr(sys, "argv", [tier.__file__, "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        tier.main()
    assert stopped.value.code == "failed or missed:\nbreaks: ValueError\nworks: after"
    assert "after: 2" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == {"breaks", "works"}
    assert '"before"' in (tmp_path / "breaks.json").read_text()
