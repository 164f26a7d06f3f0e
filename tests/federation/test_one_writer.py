"""A run directory belongs to one process: another one is refused at once, and a killed one is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.files import LOCK, holder, holding, sole_writer
from flexperts.finished.joining import join
from flexperts.server.forget_client import forget_client

SHORT = ("evaluation.max_new_tokens=2", "evaluation.rows=1", "training.local_steps=1")

HOLD = """
    import sys, time
    from pathlib import Path
    from flexperts.files import sole_writer
    with sole_writer(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process write a folder inside the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_another_process_is_refused_at_once_and_named(tmp_path: Path) -> None:
    with held(tmp_path / "run") as other:
        before = time.monotonic()
        with pytest.raises(ArtifactError) as refused, sole_writer(tmp_path / "run"):
            pytest.fail("two processes hold one folder")
        assert time.monotonic() - before < 5
        assert refused.value.value == str(tmp_path / "run")
        assert f"process {other.pid} on {os.uname().nodename} writes it" in refused.value.rule
        assert "stop it" in refused.value.remedy


def test_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    with held(tmp_path / "run") as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / "run" / LOCK).exists()
        with sole_writer(tmp_path / "run"):
            assert holder(tmp_path / "run" / LOCK) == f"process {os.getpid()} on {os.uname().nodename}"


@pytest.mark.parametrize("there", [True, False])
def test_nothing_of_a_lock_is_left(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "new" / "run"
    if there:
        folder.mkdir(parents=True)
    with sole_writer(folder):
        assert (folder / LOCK).exists()
    assert folder.exists() is there
    assert (tmp_path / "new").exists() is there
    with pytest.raises(ZeroDivisionError), sole_writer(folder):
        raise ZeroDivisionError
    assert not (folder / LOCK).exists()
    with sole_writer(folder):
        (folder / "kept").touch()
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_one_folder_by_two_names_is_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(ArtifactError, match="writes it"), sole_writer(tmp_path / "link"):
        pass


@pytest.mark.parametrize("text", ["", "x", "12", "a b c", "\x00\xff"])
def test_who_holds_it_may_not_be_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text, encoding="latin-1")
    assert holder(tmp_path / "lock") == "another process"
    assert holder(tmp_path / "none") == "another process"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="it cannot be locked"), sole_writer(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.raises(ArtifactError, match=r"No locks available.*local disk"), holding(tmp_path / LOCK, tmp_path):
        pass


def test_every_writer_of_a_run_is_refused_beside_another(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    config, out = recipe(*SHORT), tmp_path / "run"
    with held(out), pytest.raises(ArtifactError, match="writes it"):
        run_federation(config, out)
    run_federation(config, out)
    elsewhere = json.loads((out / "environment.json").read_text()) | {"revision": "of another machine"}
    (out / "environment.json").write_text(json.dumps(elsewhere))  # who is refused does not add its own
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with held(out):
        with pytest.raises(ArtifactError, match="writes it"):
            run_federation(recipe(*SHORT, "federation.rounds=3"), out, resume=True)
        with pytest.raises(ArtifactError, match="writes it"):
            join(out, tmp_path / "rows.jsonl", name="late")
        (out / "summary.json").rename(tmp_path / "summary.json")
        with pytest.raises(ArtifactError, match="writes it"):
            run_federation(config, out, resume=True)
        with pytest.raises(ArtifactError, match="writes it"):
            forget_client(RunDirectory.open(out), "shop")
        (tmp_path / "summary.json").rename(out / "summary.json")
    assert run_federation(config, out, resume=True)  # finished: nothing is written
    (out / ".summary.json.part").touch()
    (out / LOCK).touch()  # what one has left that was killed in its last moments
    assert run_federation(config, out, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


RUN = """
    import sys
    from pathlib import Path
    from flexperts.errors import ArtifactError
    from flexperts.engines.run import run_federation
    from flexperts.recipe import parse_recipe
    try:
        run_federation(parse_recipe(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), resume=True)
    except ArtifactError as error:
        print(error)
        sys.exit(2)
"""


@pytest.mark.faults
def test_of_two_that_resume_one_run_one_goes_on(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Real processes on one directory: every round is there once, whichever came first."""
    (tmp_path / "recipe.toml").write_text(recipe(*SHORT, "federation.rounds=4").to_toml())
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path / "recipe.toml"), str(tmp_path / "run")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 2], [0, 0])  # the second may come when the first has ended
    if codes == [0, 2]:
        assert any("writes it" in text for text in said)
    assert [record["number"] for record in RunDirectory(tmp_path / "run").rounds()] == [1, 2, 3, 4]
