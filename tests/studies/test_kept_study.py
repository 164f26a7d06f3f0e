"""The finished runs of a comparison in one file: no text in it, and what comes out is compared and continued."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from flexperts.errors import ArtifactError, DataError
from flexperts.files import read_lines, sealed, write_json, write_text
from flexperts.studies.collect import collect_comparison
from flexperts.studies.entries import ComparisonPlan
from flexperts.studies.finished import CLAIM
from flexperts.studies.runner import jobs

from ..scripts import script  # noqa: TID252

Planned = Callable[..., ComparisonPlan]


@pytest.fixture
def keeping() -> Any:
    return script("benchmarks/keep_study.py")


def test_kept_runs_are_the_runs_without_their_texts(
    keeping: Any,
    plan: Planned,
    work: Path,
    compared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeping, "HERE", str(work.parent))
    out, file, back = tmp_path / "before" / "study", tmp_path / "runs.tar.xz", tmp_path / "after" / "study"
    shutil.copytree(compared, out)
    missing = [job for job in jobs(plan(), out) if job.seed == 1]
    for job in missing:
        shutil.rmtree(job.folder)
    run = next(out.rglob("predictions")).parent  # a newcomer has joined it, whose rows the recipe's data leaves out
    row = {"instruction": "of the newcomer", "context": "", "response": "new", "scores": {}}
    write_text(run / "predictions" / "newcomer.jsonl", json.dumps(row) + "\n")
    write_json(run / "joined" / "newcomer.json", sealed({"client": "newcomer"}))
    assert keeping.pack(out, file) == len(jobs(plan(), out)) - len(missing) > 0

    texts = {row["instruction"] for path in out.rglob("predictions/*.jsonl") for row in read_lines(path)}
    with tarfile.open(file) as archive:
        kept = b"".join(archive.extractfile(member).read() for member in archive if member.isfile())  # type: ignore[union-attr]
    assert texts
    assert not [text for text in texts if json.dumps(text)[1:-1].encode() in kept]
    assert str(work).encode() not in kept

    keeping.unpack(file, back)
    assert [job.done for job in jobs(plan(), back)] == [job.done for job in jobs(plan(), out)]
    assert (back / run.relative_to(out) / "joined" / "newcomer.json").exists()
    assert json.loads((back / CLAIM).read_text()) == json.loads((out / CLAIM).read_text())
    assert collect_comparison(back) == collect_comparison(out)
    with pytest.raises(ArtifactError, match="it exists already"):
        keeping.unpack(file, back)


def test_a_scored_row_that_the_data_no_longer_has_is_refused(
    keeping: Any, work: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left that a comparison would take for finished runs."""
    monkeypatch.setattr(keeping, "HERE", str(work.parent))
    file, back = tmp_path / "runs.tar.xz", tmp_path / "new" / "back"
    keeping.pack(compared, file)
    monkeypatch.setattr(keeping, "load_clients", lambda *_: {})
    for _ in range(2):
        with pytest.raises(DataError, match="does not have it"):
            keeping.unpack(file, back)
        assert list(back.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["plain", "jürgen's"])
def test_no_folder_of_a_machine_is_packed(
    keeping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where JSON escapes it, and a folder whose name only begins the same is another one."""
    here = tmp_path / name
    monkeypatch.setattr(keeping, "HERE", str(here))
    recipe = tomli_w.dumps({"data": {"folder": str(here / "data")}})
    for file in (CLAIM, "config.toml"):
        path = tmp_path / file
        claim = {"recipe": recipe, "entries": {"a": [f"knowledge.general={here}/data/g.jsonl"]}}
        path.write_text(recipe if file == "config.toml" else json.dumps(claim))
        packed = keeping._relocated(path, str(here), keeping.PLACE)
        assert str(here).encode() not in packed
        assert name.encode() not in packed
        (tmp_path / file).write_bytes(packed)
        back = keeping._relocated(path, keeping.PLACE, str(here)).decode()
        assert back == recipe if file == "config.toml" else json.loads(back) == claim
    for elsewhere in (f"{here}-data/silos", "/mnt/hospital-7/silos"):
        claim = {"recipe": tomli_w.dumps({"data": {"folder": elsewhere}}), "entries": {}}
        (tmp_path / CLAIM).write_text(json.dumps(claim))
        with pytest.raises(ArtifactError, match="outside of the repository"):
            keeping._relocated(tmp_path / CLAIM, str(here), keeping.PLACE)
