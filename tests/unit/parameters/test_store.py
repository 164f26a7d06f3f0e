"""Personal state at rest: bit-equal, whole or not at all, and refused when it is not what it should be."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexperts.checked_file import write_sealed
from flexperts.errors import ArtifactError
from flexperts.parameters.store import PersonalMeta, PersonalStore, load_personal, save_personal

META = PersonalMeta(
    client="bank",
    base="b" * 64,
    round=3,
    shared="s" * 64,
    choice={"model.layers.0.mlp.experts": (2, 0), "model.layers.1.mlp.experts": (1,)},
    selection={"model.layers.0.mlp.experts": [0.1, 1 / 3, 1e-30, 2.0]},
)


def tensors() -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return {
        "graft.up": torch.randn(3, 5, generator=stream),
        "graft.half": torch.randn(7, generator=stream).bfloat16(),
        "graft.odd": torch.tensor([float("inf"), -0.0, float("nan"), 1e-45]),
        "graft.none": torch.zeros(0, 4),
        "graft.scalar": torch.tensor(3.0),
        "graft.turned": torch.randn(2, 3, generator=stream).T,
        "graft.trained": torch.nn.Parameter(torch.ones(2)),
    }


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "personal" / "bank.safetensors"
    save_personal(path, tensors(), META)
    return path


def refusal(path: Path, base: str | None = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_personal(path, base=base)
    return str(caught.value)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    loaded, meta = load_personal(saved(tmp_path), base=META.base)
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor)]
        assert torch.equal(*bits)


def test_scales_come_back(tmp_path: Path) -> None:
    meta = replace(META, scales={"model.layers.0.mlp.experts": (0.5, 1 / 3)})
    save_personal(tmp_path / "x", {}, meta)
    assert load_personal(tmp_path / "x")[1] == meta


def test_a_client_without_tensors_keeps_its_meta(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    save_personal(path, {}, META)
    assert load_personal(path) == ({}, META)


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_personal(tmp_path / name, tensors(), META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = saved(tmp_path)
    save_personal(path, {"x": torch.ones(1)}, META)
    assert list(load_personal(path)[0]) == ["x"]
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]


def test_foreign_base_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    said = refusal(path, base="c" * 64)
    assert "belongs to base bbbbbbbbbbbb: this run's base is cccccccccccc" in said
    assert load_personal(path)[1].base == META.base


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    cuts = sorted({0, 1, 7, 8, 9, len(whole) - 1, *range(0, len(whole), len(whole) // 20)})
    assert len(cuts) > 20
    for length in cuts:
        path.write_bytes(whole[:length])
        assert "it is damaged" in refusal(path)


def test_flipped_header_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    """Damage in the metadata's text must not surface as a JSON or key error."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, header, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_personal(path)
        except ArtifactError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"flexperts-personal-1": "{}"}], ids=["none", "pt", "older"]
)
def test_other_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x", metadata=metadata)
    assert "it is not of format flexperts-personal-2" in refusal(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"choice": 3}', json.dumps({"choice": {}, "client": "a"})])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x", metadata={"flexperts-personal-2": text})
    assert "it is damaged" in refusal(tmp_path / "x")


@pytest.mark.parametrize("meta", [None, [], {}, {"client": "a"}, {**asdict(META), "round": "three"}], ids=str)
def test_a_whole_file_of_something_else_is_refused(tmp_path: Path, meta: Any) -> None:
    write_sealed(tmp_path / "x", "flexperts-personal-2", {"x": torch.ones(1)}, meta)
    assert "its metadata is not valid for a client" in refusal(tmp_path / "x")


@pytest.mark.parametrize("old", [b"bank", b"graft.odd", b"ssss", b"model.layers.0"])
def test_changed_names_and_metadata_are_refused(tmp_path: Path, old: bytes) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, old[:-1] + b"x", 1))
    assert "it is damaged" in refusal(path)


def test_one_changed_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """The format itself does not notice it."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 3):
        for bit in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert "its checksum does not fit" in refusal(path)


def test_missing_and_other_things(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "none.safetensors")
    assert "it is damaged" in refusal(tmp_path)
    (tmp_path / "text").write_text("hello, this is text and no safetensors")
    assert "it is damaged" in refusal(tmp_path / "text")


def test_unwritable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a", Path("/proc/self/a.safetensors")):
        with pytest.raises(ArtifactError, match="it cannot be written"):
            save_personal(path, tensors(), META)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(ArtifactError, match="it cannot be written"):
            save_personal(path, {"x": torch.ones(100_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from flexperts.parameters.store import PersonalMeta, load_personal, save_personal

torch.set_num_threads(1)  # a forked child cannot use its parent's thread pool
path = Path(sys.argv[1])
meta = PersonalMeta("bank", "b", 0, "", {}, {})
save = lambda version: save_personal(path, {"x": torch.full((1_000_000,), float(version))}, meta)
save(0)
caught = 0
for attempt in range(6):
    child = os.fork()
    if not child:
        for version in range(1, 10**9):
            save(version)
    while not any(name.startswith(".") for name in os.listdir(path.parent)):
        pass  # until a write is under way
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    values = load_personal(path)[0]["x"]
    assert values.shape == (1_000_000,) and values.unique().numel() == 1, values
    left = [p for p in path.parent.iterdir() if p != path]
    caught += bool(left)
    for p in left:
        p.unlink()
print("killed in the middle:", caught)
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "bank.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition(":")[2]) >= 1


# From round to round


def store(tmp_path: Path) -> PersonalStore:
    return PersonalStore(tmp_path / "personal" / "bank.safetensors", META.base)


def keep(kept: PersonalStore, round_number: int, value: float | None = None) -> None:
    tensors = {"x": torch.tensor([float(round_number) if value is None else value])}
    kept.save(tensors, replace(META, round=round_number))


def loaded(kept: PersonalStore, up_to: int) -> tuple[int, float]:
    state = kept.load(up_to)
    assert state is not None
    return state[1].round, float(state[0]["x"])


def test_before_any_state_there_is_none(tmp_path: Path) -> None:
    assert store(tmp_path).load(0) is None
    assert store(tmp_path).load(7) is None
    assert not list(tmp_path.iterdir())


def test_the_newest_state_and_the_one_before_are_kept(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for number in (0, 1, 2, 5):
        keep(kept, number)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["personal/bank.safetensors", "personal/before/bank.safetensors"]
    assert [loaded(kept, up_to) for up_to in (99, 5, 4, 3, 2)] == [(5, 5), (5, 5), (2, 2), (2, 2), (2, 2)]
    assert load_personal(kept.older)[1].round == 2


def test_a_round_that_is_done_again_replaces_its_own_state_only(tmp_path: Path) -> None:
    kept = store(tmp_path)
    keep(kept, 1)
    keep(kept, 2)
    keep(kept, 2, -7.0)
    assert loaded(kept, 2) == (2, -7)
    assert loaded(kept, 1) == (1, 1)


def test_an_earlier_round_never_becomes_the_one_before(tmp_path: Path) -> None:
    """A run that is taken up before rounds of both states writes over the newest: nothing later stays as old."""
    kept = store(tmp_path)
    keep(kept, 1)
    keep(kept, 3)
    keep(kept, 2, -2.0)
    assert loaded(kept, 2) == (2, -2)
    assert loaded(kept, 1) == (1, 1)


@pytest.mark.parametrize(("rounds", "up_to", "newest"), [((3,), 2, 3), ((2, 3), 1, 3), ((0, 1, 2), 0, 2)])
def test_only_later_states_are_refused(tmp_path: Path, rounds: tuple[int, ...], up_to: int, newest: int) -> None:
    kept = store(tmp_path)
    for number in rounds:
        keep(kept, number)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ArtifactError) as caught:
        kept.load(up_to)
    assert f"bank.safetensors is of round {newest}: the server asks for round {up_to} or before" in str(
        caught.value
    )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")} == before


def test_a_state_of_another_base_is_refused(tmp_path: Path) -> None:
    keep(store(tmp_path), 1)
    with pytest.raises(ArtifactError, match="belongs to base bbbbbbbbbbbb"):
        PersonalStore(tmp_path / "personal" / "bank.safetensors", "c" * 64).load(1)


def test_a_damaged_newest_state_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    kept = store(tmp_path)
    keep(kept, 1)
    keep(kept, 2)
    kept.path.write_bytes(kept.path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="it is damaged"):
        kept.load(9)


def test_clients_do_not_see_each_others_states(tmp_path: Path) -> None:
    """The file of the round before is not another client's, whatever the clients are called."""
    kept = [
        PersonalStore(tmp_path / f"{name}.safetensors", META.base) for name in ("bank", "before", "bank.before")
    ]
    for number, one in enumerate(kept):
        for round_number in (1, 2):
            keep(one, round_number, 10 * number + round_number)
    assert [loaded(one, up_to)[1] for one in kept for up_to in (1, 2)] == [1, 2, 11, 12, 21, 22]
