"""Other users of the machine: names that can be foreseen, links in the way, files to read; and full disks."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.export.exporting import FORMS, export_run
from flexperts.files import LOCK, PRIVATE, PUBLIC, sole_writer, write_bytes, write_json, write_text
from flexperts.finished.joining import join
from flexperts.reports.html import write_reports
from flexperts.server.forget_client import forget_client

Recipe = Callable[..., RunConfig]
SHORT = ("data.silos.train_rows=4", "federation.rounds=1", "evaluation.rows=1", "evaluation.max_new_tokens=1")
ROWS = "".join(f'{{"instruction": "Say {n}", "response": "{n}"}}\n' for n in range(12))


@pytest.fixture(autouse=True)
def careless() -> Iterator[None]:
    """Let the process create files that everyone can read and write."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("untouched")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = os.umask(0)
    out = tmp_path_factory.mktemp("private") / "runs" / "one"
    run_federation(recipe(*SHORT, "method.reference=local", "evaluation.routing_rows=1"), out)
    os.umask(before)
    return out


def modes(folder: Path) -> dict[str, int]:
    """Return the bits that others and the group have of a folder and everything in it, where they have any."""
    found = {str(path): path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))}
    return {path: mode for path, mode in found.items() if mode}


# Temporary names and links.


def test_temporary_names_cannot_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = os.open

    def watched(path: str | Path, flags: int, mode: int = 0o777) -> int:
        opened.append(Path(path).name)
        assert flags & os.O_EXCL
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", watched)
    for _ in range(20):
        write_bytes(tmp_path / "summary.json", b"x")
    assert len(set(opened)) == 20
    assert not any("summary" in name for name in opened)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_link_in_a_files_place_is_replaced(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "keys.toml"
    for write in (lambda: write_bytes(path, b"secret"), lambda: write_text(path, "x"), lambda: write_json(path, 1)):
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
        write()
        assert not path.is_symlink()
        assert victim.read_text() == "untouched"
        assert path.stat().st_mode & 0o777 == PRIVATE


def test_a_link_in_place_of_the_lock_or_the_rounds_is_refused(tmp_path: Path, victim: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / LOCK).symlink_to(victim)
    with pytest.raises(ArtifactError, match=r"cannot be locked"), sole_writer(run.path):
        pass
    (run.path / "rounds.jsonl").symlink_to(victim)
    with pytest.raises(ArtifactError, match="it cannot be written"):
        run.append_round({"number": 1})
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("name", ["joined", "personal", "predictions", "reference/personal"])
def test_a_run_directory_that_leads_elsewhere_is_not_written(
    finished: Path, tmp_path: Path, recipe: Recipe, name: str
) -> None:
    """A directory that someone handed out may have a link instead of a folder."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in finished.rglob("*"):
        if path.is_file():
            write_bytes(run / path.relative_to(finished), path.read_bytes())
    (run / name).rename(run / "before") if (run / name).exists() else None
    (run / name).symlink_to(elsewhere)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    for use in (
        lambda: join(run, tmp_path / "rows.jsonl", name="late"),
        lambda: forget_client(RunDirectory.open(run), "shop"),
    ):
        with pytest.raises(ArtifactError, match=f"{name}: it is a link"):
            use()
    assert not list(elsewhere.iterdir())


# Who can read.


def test_a_run_is_for_its_user_only(finished: Path, tmp_path: Path) -> None:
    assert finished.stat().st_mode & 0o777 == 0o700
    assert not modes(finished)
    assert {"predictions", "personal", "reference"} <= {path.name for path in finished.iterdir()}


def test_also_in_a_folder_that_was_there_before(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(0o777)
    run_federation(recipe(*SHORT), out)
    assert not modes(out)


def test_a_client_that_joins_is_for_its_user_only(recipe: Recipe, tmp_path: Path) -> None:
    run_federation(recipe(*SHORT), tmp_path / "run")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    join(tmp_path / "run", tmp_path / "rows.jsonl", name="late")
    assert (tmp_path / "run" / "personal" / "late.safetensors").exists()
    assert not modes(tmp_path / "run")


@pytest.mark.parametrize(("examples", "mode"), [(None, PUBLIC), ({"shop": [{"instruction": "x"}]}, PRIVATE)])
def test_pages_with_rows_are_for_their_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: object, mode: int
) -> None:
    for name in ("html_report", "markdown_report"):
        monkeypatch.setattr(f"flexperts.reports.html.{name}", lambda _: "x")
    write_reports({"examples": examples}, tmp_path / "pages")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "pages").iterdir()} == {mode}


@pytest.mark.parametrize("form", ["transformers", "personal"])
def test_an_export_of_personal_weights_is_for_its_user_only(finished: Path, tmp_path: Path, form: str) -> None:
    export_run(finished, tmp_path / "out", client="shop", form=form, state="personalized", check=False)
    assert not modes(tmp_path / "out")


def test_an_export_of_the_common_model_is_for_everyone(finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "out", form="adapter", state="global", check=False)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# Full disks.


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let files in the block have no more bytes than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_on_a_full_disk_is_refused(finished: Path, tmp_path: Path, form: str) -> None:
    """Whatever file does not fit: nothing is left behind."""
    given = {"client": None if form in ("merged", "gguf") else "shop", "form": form, "check": False}
    if form == "adapter":
        given["state"] = "global"
    whole = export_run(finished, tmp_path / "whole", **given).folder
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    (tmp_path / "in").mkdir()
    for size in (0, *sizes[:-1]):
        with room(size), pytest.raises(ArtifactError, match=r"it cannot be written .*; free some space"):
            export_run(finished, tmp_path / "in" / "out", **given)
        assert not list((tmp_path / "in").iterdir())
