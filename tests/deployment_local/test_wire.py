"""Records survive the way over the socket, and nothing else gets through."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from flexperts.communication.traffic import encoded_objects
from flexperts.communication.wire import deserialize, serialize
from flexperts.errors import FederationError

INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False) | st.just(math.nan)  # JSON knows one NaN
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = [INTEGERS, FLOATS, TEXTS, st.binary(max_size=20), st.booleans()]
NUMBERS = [INTEGERS, FLOATS]
TYPES = ["float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool"]


def values(scalars: list[st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return st.one_of(*scalars, *(st.lists(one, max_size=4) for one in scalars))


def named(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(TEXTS, strategy, max_size=4)


ARRAYS = st.sampled_from(TYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
RECORDS = st.one_of(
    named(ARRAYS).map(lambda arrays: ArrayRecord({name: Array(array) for name, array in arrays.items()})),
    named(values(SCALARS)).map(ConfigRecord),
    named(values(NUMBERS)).map(MetricRecord),
)


def plain(content: RecordDict) -> list[tuple[str, str, Any]]:
    """Return everything that a RecordDict holds, types distinguished and NaN equal to itself."""
    return [
        (name, type(record).__name__, [(key, repr(value)) for key, value in record.items()])
        for name, record in content.items()
    ]


@given(named(TEXTS), st.dictionaries(TEXTS, RECORDS, max_size=4))
def test_what_is_packed_comes_out_again(fields: dict[str, str], contents: dict[str, Any]) -> None:
    content = RecordDict(contents)
    told, came = deserialize(serialize(fields, content))
    assert told == fields
    assert plain(came) == plain(content)
    assert [*encoded_objects(came)] == [*encoded_objects(content)]


def test_arrays_keep_type_and_shape_whatever_way_they_lie_in_memory() -> None:
    table = np.arange(6, dtype=">f4").reshape(2, 3)
    arrays = {"big endian": table, "columns first": np.asfortranarray(table), "number": np.array(7, dtype="u2")}
    came = deserialize(serialize({}, RecordDict({"a": ArrayRecord({n: Array(a) for n, a in arrays.items()})})))[1]
    for name, array in arrays.items():
        found = came.array_records["a"][name].numpy()
        assert found.shape == array.shape
        assert found.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found, array)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(FederationError, match="between relay and worker"):
        deserialize(noise)


@given(st.data())
def test_a_damaged_message_is_refused_or_is_another_message(data: st.DataObject) -> None:
    message = bytearray(serialize({"kind": "train"}, RecordDict({"m": MetricRecord({"x": 1})})))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(FederationError):
        assert isinstance(deserialize(bytes(message))[1], RecordDict)


JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(["arrays", "config", "metrics"])
ENTRIES = st.lists(st.tuples(TEXTS, KINDS, st.lists(st.tuples(TEXTS, JSON), max_size=2) | JSON), max_size=2)
ODD = JSON | st.fixed_dictionaries({"fields": JSON | st.just({}), "records": JSON | ENTRIES})


@given(ODD)
def test_a_safetensors_value_with_odd_metadata_is_refused_or_holds_records(value: Any) -> None:
    message = save({"0": np.zeros(2, dtype=np.float32)}, metadata={"flexperts-message-1": json.dumps(value)})
    try:
        fields, content = deserialize(message)
    except FederationError:
        return
    assert all(isinstance(text, str) for text in fields.values())
    assert isinstance(content, RecordDict)


def test_deeply_nested_metadata_is_refused() -> None:
    message = save({}, metadata={"flexperts-message-1": "[" * 100_000})
    with pytest.raises(FederationError):
        deserialize(message)


@pytest.mark.parametrize(
    "array",
    [
        Array(np.array(["a text"])),
        Array("float32", (1,), "numpy.ndarray", b"no array"),
        Array("float32", (1,), "torch.tensor", b""),
        Array(np.zeros(1, dtype=np.complex128)),
    ],
    ids=["texts", "noise", "another kind", "complex128"],
)
def test_an_array_that_cannot_be_carried_is_refused(array: Array) -> None:
    with pytest.raises(FederationError):
        serialize({}, RecordDict({"a": ArrayRecord({"a": array})}))
