"""Malformed manifests and messages: a clean refusal, or a payload that fits its manifest."""

from __future__ import annotations

import json
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from harness import PLAIN, TEXT, clean_refusals, fuzz, mutated
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexperts.communication import wire
from flexperts.communication.compression import pack
from flexperts.communication.messages import Expected, payload_of, records
from flexperts.config.federation import CompressionConfig
from flexperts.parameters.vector import Manifest, Payload

MANIFEST = Manifest(("base_model.a", "part.b"), ((2, 3), ()))
SENT = Payload(MANIFEST, np.arange(7, dtype=np.float32))
KINDS: list[Any] = ["none", "fp16", "int8", "top_k"]
WANTED = [Expected(MANIFEST, SENT, CompressionConfig(kind=kind, block=3)) for kind in KINDS]
SHAPES = st.lists(st.integers(-2, 9), max_size=3)


def texts(whole: str) -> st.SearchStrategy[str]:
    return mutated(whole.encode()).map(lambda b: b.decode(errors="replace"))


@fuzz(
    1500,
    st.one_of(texts(MANIFEST.to_json()), PLAIN.map(json.dumps), st.lists(st.tuples(TEXT, SHAPES)).map(json.dumps)),
)
def test_manifests(text: str, folder: Path) -> None:
    manifest = Manifest.from_json(text)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.size >= 0
    SENT.check(manifest, "bank")


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Return arrays of any type and shape, some with bytes that are none."""
    kind = draw(st.sampled_from(["f4", "f8", "f2", "i4", "i8", "u1", "b1", "c8", "S3", "U2", "M8[s]", "f4,i4"]))
    shape = draw(st.sampled_from([(7,), (), (0,), (1, 7), (7, 1), (6,), (2, 2)]))
    whole: NDArray[Any] = np.zeros(shape, dtype=kind)
    if draw(st.booleans()):
        return Array(whole)
    buffer = BytesIO()
    np.save(buffer, whole, allow_pickle=False)
    content = draw(mutated(buffer.getvalue()) | st.just(pickled()))
    return Array(
        dtype=draw(TEXT) or "f4",
        shape=draw(st.sampled_from([(7,), (), (-1,), (10**12,)])),
        stype=draw(st.sampled_from(["numpy.ndarray", "x"])),
        data=content or b"x",
    )


def pickled() -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PLAIN_MANIFEST = zlib.compress(MANIFEST.to_json().encode())
MANIFESTS = st.one_of(
    st.just(PLAIN_MANIFEST),
    mutated(PLAIN_MANIFEST),
    texts(MANIFEST.to_json()).map(lambda text: zlib.compress(text.encode())),
    st.sampled_from(["text", 3, 0.5, [1, 2], b"", zlib.compress(b" " * 10_000_000)]),
)
PACKING = st.sampled_from(["fp16", "int8", "top_k", "none", "", "x", 3, b"fp16"])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "manifest": MANIFESTS,
        "packing": PACKING,
        "block": st.integers(-2, 300),
        "exponent": st.integers(-300, 300),
    },
)
NAMES = st.sampled_from(["shared", "values", "scales", "places", "x", ""])


@fuzz(
    1500,
    st.tuples(
        FIELDS, st.dictionaries(NAMES, st.dictionaries(NAMES, arrays(), max_size=3), max_size=2), st.booleans()
    ),
)
def test_messages(drawn: Any, folder: Path) -> None:
    fields, records_of_arrays, packed = drawn
    content = RecordDict({name: ArrayRecord(items) for name, items in records_of_arrays.items()})
    content["info"] = ConfigRecord(fields)
    for expected in WANTED if packed else [None]:
        with clean_refusals():
            check(payload_of(content, "bank", expected))


def check(payload: Payload) -> None:
    assert payload.vector.dtype == np.float32
    assert payload.vector.shape == (payload.manifest.size,)
    payload.tensors()


@fuzz(600, st.tuples(st.sampled_from(["fp16", "int8", "top_k"]), st.data()))
def test_packed_updates(drawn: Any, folder: Path) -> None:
    """Right messages in which one thing is replaced."""
    kind, choose = drawn
    settings = CompressionConfig(kind=kind, block=3, fraction=0.4)
    packed = pack(np.linspace(-1, 1, 7, dtype=np.float32), settings)
    content = records({}, payload=SENT, packed=packed)
    info, held = content.config_records["info"], content.array_records["shared"]
    if choose.draw(st.booleans()):
        name = choose.draw(st.sampled_from(sorted(info)))
        info[name] = choose.draw(
            st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=4), TEXT)
        )
    else:
        held[choose.draw(st.sampled_from(sorted(held)))] = choose.draw(arrays())
    check(payload_of(content, "bank", Expected(MANIFEST, SENT, settings)))


CONTENT = records({"client": "bank", "round": 3, "states": ["global"]}, {"loss": 0.5}, SENT)
WIRED = wire.serialize({"kind": "train"}, CONTENT)


@fuzz(1000, st.one_of(mutated(WIRED), st.binary(max_size=60)))
def test_bytes_on_the_silo_s_socket(message: bytes, folder: Path) -> None:
    fields, content = wire.deserialize(message)
    assert all(isinstance(text, str) for text in fields.values())
    assert all(isinstance(record, ArrayRecord | ConfigRecord | MetricRecord) for record in content.values())
