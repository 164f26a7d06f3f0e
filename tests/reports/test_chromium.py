"""The page in a browser: it opens from a disk, paints, and does not scroll sideways on a phone."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from flexperts.reports.html import html_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
NAMES = [
    "flex",
    "fedavg",
    "local",
    *(f"flex, with a setting whose name is rather long, number {i}" for i in range(5)),
]
# The page forbids itself scripts, so its width is measured from a page around it, in a frame as wide as a screen.
AROUND = """<!doctype html><title>waiting</title>
<iframe srcdoc="{page}" style="width:{width}px;height:844px;border:0"></iframe>
<script>addEventListener("load", () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = `inside ${{root.scrollWidth}} of ${{root.clientWidth}}`;
}});</script>"""


def browse(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'user'}",
    )
    done = subprocess.run(
        [BROWSER, *options, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(folder)},
    )
    return done.stdout


@pytest.fixture
def page(tmp_path: Path, made: Callable[..., dict[str, Any]]) -> Path:
    """A page of many entries with long names, on the disk."""
    path = tmp_path / "report.html"
    path.write_text(html_report(made(NAMES, ["clinic", "help_desk", "law_firm"], 2)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_paints_and_fits(page: Path, tmp_path: Path, width: int, height: int) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, f"--screenshot={shot}", f"--window-size={width},{height}", page.as_uri())
    image = imread(shot)
    assert image.shape[:2] == (height, width)
    assert image[..., :3].std() > 0.05, "an empty page"
    around = tmp_path / "around.html"
    around.write_text(
        AROUND.format(page=html.escape(page.read_text(encoding="utf-8")), width=width), encoding="utf-8"
    )
    seen = re.search(r"<title>inside (\d+) of (\d+)", browse(tmp_path, "--dump-dom", around.as_uri()))
    assert seen is not None
    assert [int(n) for n in seen.groups()] == [width, width]


def test_the_browser_reads_the_page_as_it_was_written(page: Path, tmp_path: Path) -> None:
    seen = browse(tmp_path, "--dump-dom", page.as_uri())
    assert "<title>study-silos</title>" in seen
    assert seen.count("<svg") == page.read_text(encoding="utf-8").count("<svg")
