"""No row's text stands in what people mail: pages, comparison.json, summaries, logs of trackers, cards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexperts.cli.main import main
from flexperts.export.exporting import export_run
from flexperts.files import read_json
from flexperts.finished.joining import join

SECRETS = {key: f"zq{key}zq" for key in ("instruction", "context", "response", "extra")}
"""What stands in the rows' columns, one of which no setting names."""
RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data]
folder = "clients"
validation_fraction = 0.3
[training]
max_length = 256
local_steps = 1
[federation]
rounds = 1
[evaluation]
max_new_tokens = 2
others_rows = 1
routing_rows = 1
[knowledge]
general = "general.jsonl"
[compare]
seeds = 1
entries = ["flex", "zero_shot", "broken"]
[compare.variants]
broken = ["method.name=flex", "training.lr=1e30", "training.local_steps=3"]
"""


def rows(count: int, side: str) -> str:
    texts = [{key: f"{value} {side} {i}" for key, value in SECRETS.items()} for i in range(count)]
    return "".join(json.dumps(text) + "\n" for text in texts)


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("private")
    for client in ("bank", "cafe"):
        (folder / "clients" / client).mkdir(parents=True)
        for side, count in (("train", 6), ("test", 5)):
            (folder / "clients" / client / f"{side}.jsonl").write_text(rows(count, f"{client} {side}"))
    (folder / "new.jsonl").write_text(rows(6, "new"))
    (folder / "general.jsonl").write_text(rows(2, "general"))
    (folder / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    return folder


@pytest.fixture(scope="module")
def compared(work: Path) -> Path:
    """A comparison of which one entry fails."""
    assert call("compare", work / "recipe.toml", "--out", work / "compared") == 1
    return work / "compared"


@pytest.fixture(scope="module")
def single(work: Path) -> Path:
    """A run that a newcomer has joined, with an export and a page."""
    out = work / "single"
    assert call("run", work / "recipe.toml", "--out", out, "--track", "tensorboard") == 0
    join(out, work / "new.jsonl", steps=1)
    export_run(out, work / "exported", client="bank", form="merged", check=False)
    assert call("report", out) == 0
    return out


def leaks(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every file beside the predictions that holds text of a row."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "predictions"):
        content = path.read_bytes()
        yield from (
            (str(path.relative_to(folder)), key) for key, text in SECRETS.items() if text.encode() in content
        )


def test_a_comparison_holds_no_rows_text(compared: Path) -> None:
    assert (compared / "runs" / "broken" / "seed-0" / "error.txt").exists()
    assert {p.name for p in compared.iterdir()} >= {"report.html", "report.md", "comparison.json"}
    assert list(leaks(compared)) == []
    predictions = compared / "runs" / "flex" / "seed-0" / "predictions" / "bank.jsonl"
    assert SECRETS["context"] in predictions.read_text()  # else this test would see nothing


def test_a_single_run_its_trackers_and_its_export_hold_none(single: Path, work: Path) -> None:
    assert (single / "tensorboard").is_dir()
    assert (work / "exported" / "README.md").exists()
    assert list(leaks(single)) == list(leaks(work / "exported")) == []


@pytest.mark.parametrize("kind", ["compared", "single"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_samples_are_shown_when_asked_for_with_a_warning_above(
    kind: str, count: int, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(kind)
    shown = min(count, 5)
    assert call("report", folder, "--samples", count) == 0
    warning = "This page holds rows of these silos, with their passages and answers: "
    assert warning in capsys.readouterr().out
    for name, secrets in (("report.html", 3), ("report.md", 3)):
        page = (folder / name).read_text()
        assert page.index(warning) < page.index("own test rows")
        assert f"bank ({shown}), cafe ({shown})" in page
        assert sum(text in page for text in SECRETS.values()) == secrets
        assert page.count(SECRETS["instruction"]) == 2 * shown
    examples = read_json(folder / "comparison.json")["examples"]
    assert {client: len(found) for client, found in examples.items()} == {"bank": shown, "cafe": shown}
    assert call("report", folder) == 0  # the next page without the option holds none
    assert list(leaks(folder)) == []


def test_compare_takes_the_same_option(work: Path, compared: Path) -> None:
    assert call("compare", work / "recipe.toml", "--out", compared, "--methods", "flex", "--samples", "1") == 0
    assert SECRETS["response"] in (compared / "report.md").read_text()
    assert call("compare", work / "recipe.toml", "--out", compared, "--methods", "flex") == 0
    assert list(leaks(compared)) == []


def test_a_comparison_json_alone_loses_its_rows_too(compared: Path, tmp_path: Path) -> None:
    """As one that an earlier version has made, or a colleague has sent."""
    assert call("report", compared, "--samples", 3) == 0
    content = (compared / "comparison.json").read_text()
    assert SECRETS["context"] in content
    for count, left in ((2, 2), (0, 0)):
        (tmp_path / "comparison.json").write_text(content)
        assert call("report", tmp_path, "--samples", count) == 0
        examples = read_json(tmp_path / "comparison.json")["examples"]
        assert [len(found) for found in examples.values()] == [left] * (2 if left else 0)
    assert list(leaks(tmp_path)) == []
    assert call("report", compared) == 0
