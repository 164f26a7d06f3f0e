"""Messages carry the shared vector and small records, and refuse everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch.nn import Parameter

from flexperts.communication.messages import (
    check_manifest,
    encode_shared,
    info_of,
    metrics_of,
    records,
    vector_of,
)
from flexperts.errors import FederationError, PrivacyError
from flexperts.federation.flower_private import assume_identity
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Manifest


@pytest.fixture(autouse=True)
def server() -> None:
    assume_identity(1)


def message(content: RecordDict) -> Message:
    return Message(content, 2, "train")


def split(**shared: torch.Tensor) -> ParameterSplit:
    kept = {"graft.gate": Parameter(torch.full((3,), 77.0))}
    frozen = {"base": Parameter(torch.full((3,), 88.0), requires_grad=False)}
    return ParameterSplit({n: Parameter(t) for n, t in shared.items()}, kept, frozen)


VECTOR = np.array([1.5, -2, 3], np.float32)


def test_only_the_shared_group_is_encoded() -> None:
    vector = encode_shared(split(b=torch.tensor([3.0, 4.0]), a=torch.tensor([[1.0]])))
    assert vector.tolist() == [1, 3, 4]
    assert vector.dtype == np.float32


def test_the_encoding_is_a_copy() -> None:
    """A later training step must not change a reply that is under way."""
    parts = split(a=torch.ones(2))
    vector = encode_shared(parts)
    with torch.no_grad():
        parts.shared["a"].fill_(9)
    assert vector.tolist() == [1, 1]


@pytest.mark.parametrize("argument", [{}, {"graft.gate": Parameter(torch.ones(1))}, [torch.ones(1)], None])
def test_what_is_no_split_is_not_encoded(argument: Any) -> None:
    with pytest.raises(PrivacyError, match="only a ParameterSplit is encoded"):
        encode_shared(argument)


@pytest.mark.parametrize("group", ["personal", "frozen"])
def test_a_shared_name_for_kept_memory_is_not_encoded(group: str) -> None:
    """split_parameters refuses such a split; one built by hand must not get through either."""
    secret = torch.arange(8.0)
    kept: dict[str, dict[str, Parameter]] = {"personal": {}, "frozen": {}}
    kept[group] = {"secret": Parameter(secret)}
    smuggled = ParameterSplit({"a": Parameter(torch.ones(1)), "lora": Parameter(secret[2:4])}, **kept)
    with pytest.raises(PrivacyError, match="shared lora: its memory belongs to a parameter that stays"):
        encode_shared(smuggled)


def test_aliasing_by_a_later_assignment_is_found() -> None:
    parts = split(a=torch.ones(3))
    parts.shared["a"].data = parts.personal["graft.gate"].data
    with pytest.raises(PrivacyError):
        encode_shared(parts)


def test_a_record_holds_the_shared_vector_and_nothing_else() -> None:
    content = records({"client": "bank", "states": ["a", "b"], "round": 3}, {"loss": 0.5, "rows": 8}, VECTOR)
    assert {k: list(r) for k, r in content.array_records.items()} == {"shared": ["shared"]}
    assert set(content) == {"info", "metrics", "shared"}
    sent = message(content)
    assert info_of(sent) == {"client": "bank", "states": ["a", "b"], "round": 3}
    assert metrics_of(sent) == {"loss": 0.5, "rows": 8}
    assert np.array_equal(vector_of(sent, 3, "bank"), VECTOR)


def test_vector_survives_the_encoding_bit_for_bit() -> None:
    odd = np.array([0.0, -0.0, 1e-45, 3.4e38, np.pi], np.float32)
    sent = message(RecordDict.inflate(*deflated(records({}, None, odd))))
    assert vector_of(sent, 5, "bank").tobytes() == odd.tobytes()


def deflated(content: Any) -> tuple[bytes, dict[str, Any]]:
    children = {i: type(c).inflate(*deflated(c)) for i, c in (content.children or {}).items()}
    return content.deflate(), children


@pytest.mark.parametrize("vector", [None, np.zeros(0, np.float32)])
def test_without_a_vector_there_is_no_array(vector: Any) -> None:
    content = records({"client": "bank"}, {"loss": 1.0}, vector)
    assert not content.array_records
    assert vector_of(message(content), 0, "bank").shape == (0,)


def test_info_alone() -> None:
    assert set(records({"send_initial": 1})) == {"info"}


def array(values: Any, dtype: Any = np.float32) -> Array:
    return Array(np.asarray(values, dtype=dtype))


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"shared": {"shared": array([1, 2, 3]), "graft.gate": array([1])}}, "shared/graft.gate"),
        ({"shared": {"shared": array([1, 2, 3])}, "more": {"x": array([1])}}, "more/x"),
        ({"shared": {"other": array([1, 2, 3])}}, "shared/other"),
        ({"other": {"shared": array([1, 2, 3])}}, "other/shared"),
        ({}, "[]"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, dict[str, Array]], named: str) -> None:
    content = records({})
    for key, record in arrays.items():
        content[key] = ArrayRecord(record)
    with pytest.raises(FederationError, match="carries the shared vector and no other") as caught:
        vector_of(message(content), 3, "bank")
    assert named in str(caught.value)


def test_an_array_where_the_method_sends_none_is_refused() -> None:
    with pytest.raises(FederationError, match=r"asks for float32\[0\]"):
        vector_of(message(records({}, None, VECTOR)), 0, "bank")


@pytest.mark.parametrize(
    "bad",
    [array([1, 2]), array([1, 2, 3, 4]), array([[1, 2, 3]]), array([1, 2, 3], np.float64), array([1, 2, 3], int)],
)
def test_vectors_that_do_not_fit_are_refused(bad: Array) -> None:
    content = records({})
    content["shared"] = ArrayRecord({"shared": bad})
    with pytest.raises(FederationError, match=r"bank sent .*: the manifest asks for float32\[3\]"):
        vector_of(message(content), 3, "bank")


def test_manifests_must_agree() -> None:
    ours = Manifest(("a",), ((2,),))
    check_manifest(message(records({"manifest": ours.digest})), ours, "bank")
    for info in ({"manifest": Manifest(("a",), ((3,),)).digest}, {}):
        with pytest.raises(FederationError, match="bank: the server's manifest differs"):
            check_manifest(message(records(info)), ours, "bank")
