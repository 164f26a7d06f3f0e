"""Caching, atomicity and name resolution, with a fake builder in place of the real model."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from flexperts.errors import ModelError
from flexperts.smol_moe import build
from flexperts.smol_moe.sources import file_sha256


def fake_write(folder: Path, name="smol-moe", source=None, report=print):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / build.WEIGHTS).write_bytes(b"12345")
    stamp = {**build._identity(build.base_spec(name)), "weights_bytes": 5, "dense_sha256": "d"}
    (folder / build.STAMP).write_text(json.dumps(stamp))
    report("wrote")


@pytest.fixture
def built(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXPERTS_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "write_base", fake_write)
    said: list[str] = []
    return build.build_base(report=said.append), said


def test_a_good_build_is_used_again(built):
    folder, said = built
    assert folder == build.base_folder()
    assert build.build_base(report=said.append) == folder
    assert said.count("wrote") == 1
    build.build_base(force=True, report=said.append)
    assert said.count("wrote") == 2


@pytest.mark.parametrize("damage", ["truncated", "no stamp", "bad stamp", "other asset", "other format"])
def test_a_stale_or_damaged_build_is_replaced(built, damage):
    folder, said = built
    stamp = json.loads((folder / build.STAMP).read_text())
    if damage == "truncated":
        (folder / build.WEIGHTS).write_bytes(b"123")
    elif damage == "no stamp":
        (folder / build.STAMP).unlink()
    elif damage == "bad stamp":
        (folder / build.STAMP).write_text("[1]")
    else:
        key = {"other asset": "partition_sha256", "other format": "format"}[damage]
        (folder / build.STAMP).write_text(json.dumps({**stamp, key: "other"}))
    assert not build.is_current("smol-moe", folder)
    build.build_base(report=said.append)
    assert said.count("wrote") == 2
    assert build.is_current("smol-moe", folder)


def test_a_given_source_with_other_weights_replaces_the_build(built, tmp_path):
    folder, _ = built
    gguf = tmp_path / "own.gguf"
    gguf.write_bytes(b"own")
    assert not build.is_current("smol-moe", folder, str(gguf))
    stamp = json.loads((folder / build.STAMP).read_text())
    (folder / build.STAMP).write_text(json.dumps({**stamp, "dense_sha256": file_sha256(gguf)}))
    assert build.is_current("smol-moe", folder, str(gguf))


def test_a_failed_build_leaves_the_old_one_and_no_litter(built, monkeypatch):
    folder, said = built

    def fail(new, *args):
        new.mkdir(parents=True)
        (new / build.WEIGHTS).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_base", fail)
    with pytest.raises(KeyboardInterrupt):
        build.build_base(force=True, report=said.append)
    assert build.is_current("smol-moe", folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".smol-moe.lock", "smol-moe"]


def test_the_leftovers_of_a_killed_build_are_removed(built):
    folder, said = built
    left = folder.parent / ".smol-moe.build-killed"
    shutil.copytree(folder, left / "new")
    build.build_base(force=True, report=said.append)
    assert not left.exists()


def build_in_process(cache: str, queue) -> None:
    import os

    os.environ["FLEXPERTS_CACHE"] = cache
    build.write_base = fake_write
    said: list[str] = []
    queue.put((str(build.build_base(report=said.append)), said.count("wrote")))


def test_concurrent_builders_end_with_one_build(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=build_in_process, args=(str(tmp_path), queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({folder for folder, _ in results}) == 1
    assert sum(count for _, count in results) == 1
    assert build.is_current("smol-moe", Path(results[0][0]))


def test_an_unknown_base_gets_a_hint():
    with pytest.raises(ModelError, match="did you mean 'smol-moe'"):
        build.build_base("smol_moe")
    with pytest.raises(ModelError, match="choose one of"):
        build.base_spec("zzz")


def test_resolve_base_knows_names_folders_and_hub_ids(built, tmp_path):
    folder, said = built
    assert build.resolve_base("smol-moe", said.append) == str(folder)
    assert build.resolve_base(str(folder)) == str(folder)
    assert build.resolve_base("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"


@pytest.mark.parametrize("wrong", ["smolmoe", "/no/such/folder", "./no/such", "./x", "../x", "a/b/c", ""])
def test_resolve_base_refuses_the_rest(wrong, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"hub id|config\.json"):
        build.resolve_base(wrong)


def test_resolve_base_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        build.resolve_base(str(tmp_path))
