"""The flat vector and its manifest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, flatten, is_sizes_only, vector_hash

SHAPES = st.dictionaries(st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=6)


def filled(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream).to(dtype) for name, shape in shapes.items()}


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_round_trip_is_exact(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = filled(shapes, dtype)
    manifest, vector = Manifest.of(tensors), flatten(tensors)
    assert vector.dtype == np.float32
    assert vector.shape == (manifest.size,)
    back = manifest.unflatten(vector)
    assert list(back) == sorted(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == torch.float32
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].to(dtype), tensor)
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(SHAPES, st.randoms())
def test_order_of_the_mapping_does_not_matter(shapes: dict[str, tuple[int, ...]], random: object) -> None:
    tensors = filled(shapes, torch.float32)
    names = list(tensors)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = {name: tensors[name] for name in names}
    assert np.array_equal(flatten(shuffled), flatten(tensors))
    assert Manifest.of(shuffled) == Manifest.of(tensors)


def test_layout_by_hand() -> None:
    tensors = {
        "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T,  # not contiguous
        "a": torch.tensor(9.0),
        "c": torch.tensor([5.0]),
        "B": torch.tensor([7.0], requires_grad=True),
    }
    assert flatten(tensors).tolist() == [7, 9, 1, 3, 2, 4, 5]
    assert Manifest.of(tensors) == Manifest(("B", "a", "b", "c"), ((1,), (), (2, 2), (1,)))


def test_flattening_copies_and_cutting_does_not() -> None:
    tensor = torch.ones(3)
    vector = flatten({"a": tensor})
    vector[0] = 5
    assert tensor.tolist() == [1, 1, 1]
    piece = Manifest.of({"a": tensor}).unflatten(vector)["a"]
    piece[1] = 6
    assert vector.tolist() == [5, 6, 1]


@pytest.mark.parametrize(
    "vector",
    [np.zeros(5, np.float32), np.zeros(7, np.float32), np.zeros((6, 1), np.float32), np.zeros(6, np.float64)],
)
def test_vectors_that_do_not_fit_are_refused(vector: np.ndarray) -> None:
    tensors = {"a": torch.ones(2, 3)}
    with pytest.raises(FederationError, match=r"the manifest requires float32\[6\]"):
        Manifest.of(tensors).unflatten(vector)


def test_hash_names_the_bytes() -> None:
    vector = np.arange(6, dtype=np.float32)
    assert vector_hash(vector) == vector_hash(np.arange(12, dtype=np.float32)[::2] / 2)
    changed = vector.copy()
    changed[3] = np.nextafter(changed[3], np.float32(9))
    assert vector_hash(changed) != vector_hash(vector)


def test_a_vector_without_values_keeps_names_and_shapes_and_takes_no_memory() -> None:
    shapes = {"a": torch.empty(3, 10**9, device="meta"), "b": torch.empty(7, device="meta")}
    vector = flatten(shapes)
    assert vector.shape == (3 * 10**9 + 7,)
    assert is_sizes_only(vector)
    back = Manifest.of(shapes).unflatten(vector)
    assert {n: (tuple(t.shape), t.is_meta) for n, t in back.items()} == {"a": ((3, 10**9), True), "b": ((7,), True)}


def test_vectors_with_values_are_no_such() -> None:
    one = {"a": torch.ones(1)}
    assert not any(
        is_sizes_only(v) for v in (flatten(one), flatten({}), np.zeros(Manifest.of(one).size, np.float32))
    )
