"""The server's state at rest: bit-equal, whole or not at all, refused when it is not what it should be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flexperts.checked_file import write_sealed
from flexperts.errors import ArtifactError
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server, save_server

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
PLAIN: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def server(**changes: Any) -> Server:
    given_ = {
        "shared": Payload.of({"base_model.a": filled((2, 3)), "part.b": torch.tensor([float("inf"), -0.0, 1e-45])}),
        "clients": {"bank": 8, "shop": 3},
        "reports": {"bank": {"experts": [1, 2]}, "shop": None},
        "agreement": {"layer": [0, 1]},
        "round": 3,
        "memory": {"m.base_model.a": filled((2, 3), seed=1), "t": torch.tensor(7)},
        "seed": 11,
    }
    return Server(**(given_ | changes))


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def equal(one: Server, other: Server) -> bool:
    rest = [(s.clients, s.reports, s.agreement, s.round, s.seed, s.shared.manifest) for s in (one, other)]
    memories = [{n: bits(t) for n, t in s.memory.items()} for s in (one, other)]
    return (
        rest[0] == rest[1]
        and one.shared.vector.tobytes() == other.shared.vector.tobytes()
        and memories[0] == memories[1]
    )


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint.safetensors"
    save_server(path, server())
    return path


def refusal(path: Path, clients: Any = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_server(path, clients)
    return str(caught.value)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    assert equal(load_server(saved(tmp_path)), server())
    assert equal(load_server(saved(tmp_path), {"shop": 3, "bank": 8}), server())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint.safetensors"]


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, SHAPES, max_size=4),
    st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=4),
    st.dictionaries(NAMES, PLAIN, max_size=3),
    PLAIN,
    st.integers(0, 2**63),
)
def test_any_state_comes_back(
    shared: dict[str, tuple[int, ...]], memory: dict[str, Any], reports: dict[str, Any], agreement: Any, seed: int
) -> None:
    state = server(
        shared=Payload.of({n: filled(shape) for n, shape in shared.items()}),
        memory={n: filled(shape, dtype, 1) for n, (shape, dtype) in memory.items()},
        reports=reports,
        agreement=agreement,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_server(path, state)
        assert equal(load_server(path), state)


def test_equal_names_of_shared_and_memory_stay_apart(tmp_path: Path) -> None:
    state = server(
        shared=Payload.of({"a": torch.zeros(1), "memory/a": torch.ones(1)}),
        memory={"a": torch.full((1,), 2.0), "shared/a": torch.full((1,), 3.0)},
    )
    save_server(tmp_path / "x", state)
    assert equal(load_server(tmp_path / "x"), state)


def test_saving_takes_nothing_from_the_server(tmp_path: Path) -> None:
    """It saves views, transposed tensors, and tensors that share memory, and what it loads can be worked on."""
    whole = filled((4, 3))
    state = server(
        memory={"view": whole[1:], "turned": whole.T, "same": whole, "trained": torch.nn.Parameter(whole)}
    )
    save_server(tmp_path / "x", state)
    loaded = load_server(tmp_path / "x")
    assert equal(loaded, state)
    loaded.memory["same"].add_(1)
    assert torch.equal(loaded.memory["view"], whole[1:])
    loaded.shared.tensors()["base_model.a"].add_(1)


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_server(tmp_path / name, server())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_its_random_streams_go_on(tmp_path: Path) -> None:
    """The seed is in the checkpoint: what the server draws in a later round is the same after a resume."""
    drawn = [torch.randn(3, generator=s.generator("sample", 4)) for s in (server(), load_server(saved(tmp_path)))]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("clients", [["bank"], ["bank", "shop", "clinic"], [], ["bank", "Shop"]])
def test_other_clients_are_refused(tmp_path: Path, clients: list[str]) -> None:
    said = refusal(saved(tmp_path), clients)
    assert f"has the clients bank, shop: the run now has {', '.join(sorted(clients))}" in said
    assert "resume with the same clients" in said


def test_missing(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "none.safetensors")


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(whole) - 1, *range(0, len(whole), len(whole) // 20)}):
        path.write_bytes(whole[:length])
        assert "it is damaged" in refusal(path)


def test_flipped_header_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    """Damage must not surface as another error than ours."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, header, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_server(path)
        except ArtifactError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "metadata",
    [
        None, {"format": "pt"}, {"flexperts-personal-2": "{}"}, {"flexperts-server-1": "{}"},
        {"flexperts-server-2": ""}, {"flexperts-server-2": "{"}, {"flexperts-server-2": "{}"},
        {"flexperts-server-2": "[]"}, {"flexperts-server-2": "3"},
        {"flexperts-server-2": '{"meta": "{}", "sha256": "0"}'}, {"flexperts-server-2": '{"meta": 3}'},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("clients", [None, ["bank"]])
def test_foreign_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None, clients: Any) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x", metadata=metadata)
    ours = "flexperts-server-2" in (metadata or {})
    said = "it is damaged" if ours else "it is not of format flexperts-server-2"
    assert said in refusal(tmp_path / "x", clients)


@pytest.mark.parametrize(
    "change", [{"round": "3"}, {"clients": []}, {"clients": {"bank": "8"}}, {"seed": 1.5}, {"more": 1}], ids=str
)
def test_a_whole_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    rest: Any = {"round": 1, "clients": {"bank": 1}, "reports": {}, "agreement": None, "seed": 0}
    write_sealed(tmp_path / "x", "flexperts-server-2", {"shared/a": torch.ones(1)}, rest)
    assert load_server(tmp_path / "x").round == 1
    write_sealed(tmp_path / "x", "flexperts-server-2", {"shared/a": torch.ones(1)}, rest | change)
    assert "its metadata is not a server's" in refusal(tmp_path / "x")


def test_one_changed_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """The format itself does not notice it."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert "its checksum does not fit" in refusal(path)


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    assert "it is damaged" in refusal(tmp_path)
    (tmp_path / "text").write_text("hello, this is text and no safetensors")
    assert "it is damaged" in refusal(tmp_path / "text")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="it cannot be written"):
        save_server(path / "below", server())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.safetensors"]
