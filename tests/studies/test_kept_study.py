"""The finished runs of a comparison in one file: no text in it, and what comes out is compared and continued."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    monkeypatch.setattr(keeping, "HERE", str(work))
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
    keeping: Any, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.tar.xz"
    keeping.pack(compared, file)
    monkeypatch.setattr(keeping, "load_clients", lambda *_: {})
    with pytest.raises(DataError, match="does not have it"):
        keeping.unpack(file, tmp_path / "back")
