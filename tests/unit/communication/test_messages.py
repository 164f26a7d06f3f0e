"""Messages carry one payload and small records, and refuse everything else."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch.nn import Parameter

from flexperts.communication.messages import _view, encode, info_of, metrics_of, payload_of, records
from flexperts.engines.flower_private import assume_identity
from flexperts.errors import FederationError, PrivacyError
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import Manifest, Payload, Vector


@pytest.fixture(autouse=True)
def server() -> None:
    assume_identity(1)


def split(**shared: torch.Tensor) -> ParameterSplit:
    kept = {"graft.gate": Parameter(torch.full((3,), 77.0))}
    frozen = {"base": Parameter(torch.full((3,), 88.0), requires_grad=False)}
    return ParameterSplit({n: Parameter(t) for n, t in shared.items()}, kept, frozen)


VECTOR = np.array([1.5, -2, 3], np.float32)
PAYLOAD = Payload(Manifest(("a", "b"), ((2,), (1, 1))), VECTOR)


def one(vector: Vector) -> Payload:
    return Payload(Manifest(("w",), (vector.shape,)), vector)


def test_only_the_shared_group_is_encoded() -> None:
    payload = encode(split(b=torch.tensor([3.0, 4.0]), a=torch.tensor([[1.0]])))
    assert payload.manifest == Manifest(("a", "b"), ((1, 1), (2,)))
    assert payload.vector.tolist() == [1, 3, 4]
    assert payload.vector.dtype == np.float32


def test_a_method_chooses_what_of_the_shared_group_is_sent() -> None:
    """Whole tensors, slices of them, other values under their names, and derived ones; an empty choice is empty."""
    parts = split(a=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), b=torch.tensor([5.0]))
    chosen = {"a": parts.shared["a"][1:], "derived.norm": torch.tensor(7.0)}
    assert encode(parts, chosen).manifest == Manifest(("a", "derived.norm"), ((1, 2), ()))
    assert encode(parts, chosen).vector.tolist() == [3, 4, 7]
    assert encode(parts, {"b": parts.shared["b"] * 2}).vector.tolist() == [10]
    assert encode(parts, {}).size == 0


@pytest.mark.parametrize("name", ["graft.gate", "base", "new", "derivednorm", "x.derived.y", ""])
def test_other_names_are_not_encoded(name: str) -> None:
    """Even a copy of a personal or frozen parameter has no name under which it could leave."""
    parts = split(a=torch.ones(1))
    with pytest.raises(PrivacyError, match=f"^{name}: it is not in the shared group"):
        encode(parts, {"a": parts.shared["a"], name: torch.full((3,), 77.0)})


@pytest.mark.parametrize("name", ["a", "derived.a"])
@pytest.mark.parametrize("group", ["personal", "frozen"])
def test_kept_memory_is_not_encoded_under_a_good_name(name: str, group: str) -> None:
    parts = split(a=torch.ones(1))
    kept = next(iter(getattr(parts, group).values()))
    for view in (kept, kept.detach(), kept[1:], kept.view(3, 1).T):
        with pytest.raises(PrivacyError, match=f"shared {name}: its memory belongs to a parameter that stays"):
            encode(parts, {name: view})


def test_the_encoding_is_a_copy() -> None:
    """A later training step must not change a reply that is under way."""
    parts = split(a=torch.ones(2))
    payloads = [encode(parts), encode(parts, {"a": parts.shared["a"]}), encode(parts, {"a": parts.shared["a"][:1]})]
    with torch.no_grad():
        parts.shared["a"].fill_(9)
    assert [p.vector.tolist() for p in payloads] == [[1, 1], [1, 1], [1]]


@pytest.mark.parametrize("argument", [{}, {"graft.gate": Parameter(torch.ones(1))}, [torch.ones(1)], None])
def test_what_is_no_split_is_not_encoded(argument: Any) -> None:
    with pytest.raises(PrivacyError, match="only a ParameterSplit is encoded"):
        encode(argument)


@pytest.mark.parametrize("group", ["personal", "frozen"])
def test_a_shared_name_for_kept_memory_is_not_encoded(group: str) -> None:
    """split_parameters refuses such a split; one built by hand must not get through either."""
    secret = torch.arange(8.0)
    kept: dict[str, dict[str, Parameter]] = {"personal": {}, "frozen": {}}
    kept[group] = {"secret": Parameter(secret)}
    smuggled = ParameterSplit({"a": Parameter(torch.ones(1)), "lora": Parameter(secret[2:4])}, **kept)
    with pytest.raises(PrivacyError, match="shared lora: its memory belongs to a parameter that stays"):
        encode(smuggled)


def test_aliasing_by_a_later_assignment_is_found() -> None:
    parts = split(a=torch.ones(3))
    parts.shared["a"].data = parts.personal["graft.gate"].data
    with pytest.raises(PrivacyError):
        encode(parts)


def test_a_record_holds_the_payload_and_nothing_else() -> None:
    content = records({"client": "bank", "states": ["a", "b"], "round": 3}, {"loss": 0.5, "rows": 8}, PAYLOAD)
    assert {k: list(r) for k, r in content.array_records.items()} == {"shared": ["shared"]}
    assert set(content) == {"info", "metrics", "shared"}
    sent = content
    info = dict(info_of(sent))
    manifest = Manifest.from_json(zlib.decompress(info.pop("manifest")).decode())
    assert info == {"client": "bank", "states": ["a", "b"], "round": 3}
    assert manifest == PAYLOAD.manifest
    assert metrics_of(sent) == {"loss": 0.5, "rows": 8}
    received = payload_of(sent, "bank")
    assert received.manifest == PAYLOAD.manifest
    assert np.array_equal(received.vector, VECTOR)
    assert received.tensors()["b"].tolist() == [[3]]


def test_vector_survives_the_encoding_bit_for_bit() -> None:
    odd = np.array([0.0, -0.0, 1e-45, 3.4e38, np.pi], np.float32)
    sent = RecordDict.inflate(*deflated(records({}, None, one(odd))))
    assert payload_of(sent, "bank").vector.tobytes() == odd.tobytes()


def test_names_survive_the_encoding() -> None:
    named = Payload(
        Manifest(("", "a/b", "é.lora", "日本"), ((), (1, 2), (0, 3), (2,))), np.arange(5, dtype=np.float32)
    )
    sent = RecordDict.inflate(*deflated(records({}, None, named)))
    assert payload_of(sent, "bank").manifest == named.manifest


def deflated(content: Any) -> tuple[bytes, dict[str, Any]]:
    children = {i: type(c).inflate(*deflated(c)) for i, c in (content.children or {}).items()}
    return content.deflate(), children


@pytest.mark.parametrize("payload", [None, Payload.empty()])
def test_without_a_payload_there_is_no_array(payload: Payload | None) -> None:
    content = records({"client": "bank"}, {"loss": 1.0}, payload)
    assert not content.array_records
    assert info_of(content) == {"client": "bank"}
    received = payload_of(content, "bank")
    assert received.manifest == Payload.empty().manifest
    assert received.vector.shape == (0,)


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
        ({"shared": {}, "more": {"x": array([1])}}, "more/x"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, dict[str, Array]], named: str) -> None:
    content = records({}, None, PAYLOAD)
    del content["shared"]
    for key, record in arrays.items():
        content[key] = ArrayRecord(record)
    with pytest.raises(FederationError, match="a message must contain exactly one payload") as caught:
        payload_of(content, "bank")
    assert named in str(caught.value)


def test_an_array_where_the_method_sends_none_is_refused() -> None:
    """The server checks every payload against what the method declares; here, nothing."""
    received = payload_of(records({}, None, PAYLOAD), "bank")
    with pytest.raises(FederationError, match=r"bank sent a as \(2,\) where nothing is expected"):
        received.check(Manifest((), ()), "bank")


def test_no_array_where_the_method_sends_one_is_refused() -> None:
    with pytest.raises(FederationError, match=r"bank sent a as nothing where \(2,\) is expected"):
        payload_of(records({}), "bank").check(PAYLOAD.manifest, "bank")


@pytest.mark.parametrize(
    "bad",
    [array([1, 2]), array([1, 2, 3, 4]), array([[1, 2, 3]]), array([1, 2, 3], np.float64), array([1, 2, 3], int)],
)
def test_vectors_that_do_not_fit_are_refused(bad: Array) -> None:
    content = records({}, None, PAYLOAD)
    content["shared"] = ArrayRecord({"shared": bad})
    with pytest.raises(FederationError, match=r"bank sent .*: its manifest says float32\[3\]"):
        payload_of(content, "bank")


GOOD = zlib.compress(b'[["a", [3]]]')


@pytest.mark.parametrize(
    "manifest",
    [
        None, "text", 3, b"", b"plain", GOOD[:-1], zlib.compress(b"{"), zlib.compress(b"3"), zlib.compress(b"[3]"),
        zlib.compress(b'[["a"]]'), zlib.compress(b'[["a", 3]]'), zlib.compress(b"\xff"),
        zlib.compress(b'[[1, [3]]]'), zlib.compress(b'[["a", [-3]]]'), zlib.compress(b'[["a", [3.0]]]'),
        zlib.compress(b'[["a", ["3"]]]'), zlib.compress(b'[["a", [true, 3]]]'),
        zlib.compress(b"[" * 100_000), zlib.compress(b" " * 2**26 + b"[]"),
    ],
)  # fmt: skip
def test_an_array_without_a_readable_manifest_is_refused(manifest: Any) -> None:
    content = records({} if manifest is None else {"manifest": manifest})
    content["shared"] = ArrayRecord({"shared": array([1, 2, 3])})
    with pytest.raises(FederationError, match="bank sent an array without a readable manifest"):
        payload_of(content, "bank")


def test_a_client_with_other_tensors_is_refused() -> None:
    """Equal in size is not enough: names and shapes must agree."""
    ours = Manifest(("a",), ((2,),))
    sent = payload_of(records({}, None, Payload(ours, VECTOR[:2])), "bank")
    assert sent.check(ours, "bank") is sent
    for other in (Manifest(("a",), ((3,),)), Manifest(("b",), ((2,),)), Manifest(("a",), ((2, 1),))):
        with pytest.raises(FederationError, match="bank sent a as "):
            sent.check(other, "bank")


def test_a_payload_is_read_where_it_lies_and_its_tensors_are_copies() -> None:
    content = records({"client": "bank"}, {}, PAYLOAD)
    data = content.array_records["shared"]["shared"].data
    received = payload_of(content, "bank")
    assert np.shares_memory(received.vector, np.frombuffer(data, np.uint8))
    assert not received.vector.flags.writeable
    received.tensors()["a"].add_(1)
    assert received.vector.tolist() == VECTOR.tolist()


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(order: Any) -> None:
    whole = np.asarray(np.arange(6, dtype=np.float32).reshape(2, 3), order=order)
    for array in (Array(whole), Array(whole.astype(">f4")), Array(whole[:0]), Array(np.asarray(np.float32(3)))):
        found = _view(array)
        assert (found.dtype, found.shape, found.tolist()) == (
            array.numpy().dtype,
            array.numpy().shape,
            array.numpy().tolist(),
        )


@pytest.mark.parametrize("cut", [0, 5, 100, 131, -1])
def test_what_is_cut_off_is_refused(cut: int) -> None:
    content = records({"client": "bank"}, {}, PAYLOAD)
    array = content.array_records["shared"]["shared"]
    array.data = array.data[:cut]
    with pytest.raises(FederationError, match="bank sent an array that cannot be read"):
        payload_of(content, "bank")


def test_objects_are_refused() -> None:
    content = records({"client": "bank"}, {}, PAYLOAD)
    file = BytesIO()
    np.save(file, np.array([{}, {}, {}]), allow_pickle=True)
    content.array_records["shared"]["shared"].data = file.getvalue()
    with pytest.raises(FederationError, match=r"cannot be read.*objects"):
        payload_of(content, "bank")
