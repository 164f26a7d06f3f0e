"""Named tensors as one vector: exact, copied, and checked by name and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexperts.errors import FederationError, printable
from flexperts.parameters.vector import Manifest, Payload

SHAPES = st.dictionaries(st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=6)


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_round_trip_is_exact(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) for n, t in filled(shapes).items()}
    payload = Payload.of(tensors)
    assert payload.size == payload.vector.size == sum(t.numel() for t in tensors.values())
    assert payload.vector.dtype == np.float32
    back = payload.tensors()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (torch.float32, tensor.shape)
        assert torch.equal(back[name].to(dtype), tensor)
    assert payload.check(Manifest.of(tensors), "bank") is payload


@given(SHAPES, SHAPES)
def test_check_passes_only_for_equal_names_and_shapes(
    sent: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    payload = Payload.of(filled(sent))
    manifest = Manifest.of(filled(expected))
    if sent == expected:
        assert payload.check(manifest, "bank") is payload
        return
    with pytest.raises(FederationError) as caught:
        payload.check(manifest, "bank")
    named = [n for n in sent.keys() | expected.keys() if sent.get(n) != expected.get(n)]
    assert any(str(caught.value).startswith(f"bank sent {printable(name)} as ") for name in named)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"a": (2,), "b": (3, 1)}, "bank sent b as (3, 1) where (1, 3) is expected"),
        ({"a": (2,)}, "bank sent b as nothing where (1, 3) is expected"),
        ({"a": (2,), "b": (1, 3), "c": ()}, "bank sent c as () where nothing is expected"),
        ({"a": (2,), "B": (1, 3)}, "bank sent B as (1, 3) where nothing is expected"),
        ({}, "bank sent a as nothing where (2,) is expected"),
    ],
)
def test_check_names_the_first_difference(sent: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(FederationError) as caught:
        Payload.of(filled(sent)).check(Manifest(("a", "b"), ((2,), (1, 3))), "bank")
    assert str(caught.value).startswith(
        f"{said}: a message must contain exactly the tensors that the method declares"
    )


def test_empty() -> None:
    empty = Payload.empty()
    assert (empty.size, empty.tensors(), empty.vector.shape) == (0, {}, (0,))
    assert empty.vector.dtype == np.float32
    assert Payload.of({}).manifest == empty.manifest
    assert empty.check(Manifest((), ()), "bank") is empty
    with pytest.raises(FederationError):
        Payload.of({"a": torch.zeros(0)}).check(empty.manifest, "bank")  # no value, but a name


def test_it_is_a_copy_and_its_tensors_are_views() -> None:
    """Training on must not change a payload; a server works on its vector in place through the tensors."""
    weight = torch.nn.Parameter(torch.ones(2))
    payload = Payload.of({"a": weight})
    with torch.no_grad():
        weight.fill_(9)
    assert payload.vector.tolist() == [1, 1]
    assert not payload.tensors()["a"].requires_grad
    payload.tensors()["a"].add_(1)
    assert payload.vector.tolist() == [2, 2]


def test_order_and_layout_by_hand() -> None:
    payload = Payload.of({"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, "a": torch.tensor(9.0)})
    assert payload.manifest == Manifest(("a", "b"), ((), (2, 2)))
    assert payload.vector.tolist() == [9, 1, 3, 2, 4]
