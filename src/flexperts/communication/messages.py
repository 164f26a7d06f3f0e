"""The messages between client and server: one payload of declared tensors, small records, and nothing else.

A payload is built from a ``ParameterSplit``'s shared group and from tensors that a method declares as derived;
personal and frozen parameters cannot enter it. A reply may hold its update packed (``compression.py``) in place of
the fp32 vector and its manifest: the server knows the manifest from its request, and rebuilds the vector. A request
may hold the packed differences between versions of the shared weights (``versions.py``) in place of them. The other
fields are those of ``schema.py``. Requests:
``query.join`` (who are you), ``query.initial`` (your initial shared weights), ``train``, ``evaluate``; with secure
aggregation ``query.keys``, too.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from flexperts.communication.compression import Packed, packed_bytes, unpack
from flexperts.communication.schema import MOST_VERSIONS, ROOM, AnyFields, Fields, checked, refusal
from flexperts.config.federation import CompressionConfig
from flexperts.errors import PrivacyError, incompatible, shown
from flexperts.parameters.split import ParameterSplit, kept_storages, storage_address
from flexperts.parameters.vector import Manifest, Payload, Vector

SHARED = "shared"
MASKED = "masked"
"""The packing, and the array's name, of an update with masks."""
DERIVED = "derived."
"""Start of the names of tensors that are computed from training and sent with the shared parameters."""
_INFO, _METRICS, _MANIFEST, _PACKING = "info", "metrics", "manifest", "packing"
_OF_PAYLOADS = frozenset({_MANIFEST, _PACKING, "block", "exponent"})
"""Text fields that belong to a payload."""
VERSIONS = "versions"
"""The text field of a request with differences: JSON of ``_Versions``."""
_DIFFERENCE = "difference."
"""Start of the records' names of the differences' arrays; their number follows."""
LACKS_COPY = "this silo does not have the version of the shared weights that the request changes"
"""The error of a reply that asks for all weights."""
_LONGEST_MANIFEST = 2**24
"""Most bytes of an unpacked manifest where the receiver knows none; enough for 100,000 tensors."""

Info = Mapping[str, Any]
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """The payload that a reply must hold, as the server knows it before the reply arrives.

    Args:
        manifest: Its tensors.
        sent: The payload that the sender had received; a packed reply holds the difference to it.
        packing: How the recipe packs.
    """

    manifest: Manifest
    sent: Payload
    packing: CompressionConfig

    @cached_property
    def text(self) -> str:
        """The manifest as JSON."""
        return self.manifest.to_json()

    @property
    def most(self) -> int:
        """Most bytes that a reply has: values, packed or in fp32, whichever are more; manifest; fields."""
        size = self.manifest.size  # fp32 is less than all values by top_k, or in blocks of one
        return max(4 * size, packed_bytes(size, self.packing)) + len(self.text) + ROOM


@dataclass(frozen=True)
class Update:
    """One client's reply to a train request.

    Args:
        client: Name of the client.
        payload: Its shared weights after local training, and the method's derived tensors.
        rows: Number of its train rows: the weight in the average.
        metrics: Measures of its training.
    """

    client: str
    payload: Payload
    rows: int
    metrics: Metrics

    @property
    def vector(self) -> Vector:
        """The payload's values, flat."""
        return self.payload.vector

    def tensors(self) -> dict[str, Tensor]:
        """Return the payload's named tensors."""
        return self.payload.tensors()


def encode(split: ParameterSplit, tensors: Mapping[str, Tensor] | None = None) -> Payload:
    """Return a payload; parameters get into a message only through this function.

    Args:
        split: Who owns what.
        tensors: What is sent: shared parameters or parts of them under their own names, and values computed from
            training under names that start with ``derived.``; None sends the whole shared group.
    """
    if not isinstance(split, ParameterSplit):
        raise PrivacyError(
            f"{type(split).__name__} given to the encoder",
            "only a ParameterSplit is encoded",
            "split the parameters",
        )
    sent: Mapping[str, Tensor] = split.shared if tensors is None else tensors
    kept = kept_storages(split)
    for name, tensor in sent.items():
        if name not in split.shared and not name.startswith(DERIVED):
            raise PrivacyError(f"{name}", "it is not in the shared group", "send shared parameters only")
        if storage_address(tensor) in kept:
            raise PrivacyError(
                f"shared {name}", "its memory belongs to a parameter that stays on the client", "split again"
            )
    return Payload.of(sent)


def records(
    info: Info, metrics: Metrics | None = None, payload: Payload | None = None, packed: Packed | None = None
) -> RecordDict:
    """Build a message's content: text and numbers, and at most one payload, as a vector or packed."""
    fields = dict(info)
    content = RecordDict()
    if payload is not None and payload.size:
        arrays: Mapping[str, NDArray[Any]] = {SHARED: payload.vector.astype(np.float32, copy=False)}
        if packed is None:
            fields[_MANIFEST] = zlib.compress(payload.manifest.to_json().encode())
        else:
            arrays, fields = packed.arrays, fields | dict(packed.about)
        content[SHARED] = _array_record(arrays)
    content[_INFO] = ConfigRecord(fields)
    if metrics is not None:
        content[_METRICS] = MetricRecord(dict(metrics))
    return content


def _array_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({n: Array(np.ascontiguousarray(a)) for n, a in arrays.items()})


_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Versions(Fields):
    """Digests of the versions in a request, oldest first, and what unpacking each difference also needs."""

    digests: Annotated[list[_Digest], Field(min_length=1, max_length=MOST_VERSIONS)]
    about: list[dict[str, str | int]]


def difference_records(info: Info, digests: Sequence[str], differences: Sequence[Packed]) -> RecordDict:
    """Build a request with the differences between versions of the shared weights in place of these.

    Args:
        info: Its texts and numbers.
        digests: Of the version that the receiver has, and of all later ones, oldest first.
        differences: The packed difference to each later version.
    """
    told = {"digests": list(digests), "about": [dict(packed.about) for packed in differences]}
    content = records({**info, VERSIONS: json.dumps(told)})
    for number, packed in enumerate(differences):
        content[f"{_DIFFERENCE}{number}"] = _array_record(packed.arrays)
    return content


def differences_of(content: RecordDict, sender: str) -> tuple[list[str], list[Packed]]:
    """Return the digests and differences of a request that has them; ``unpack`` checks the arrays."""
    try:
        told = _Versions.model_validate_json(info_of(content)[VERSIONS], strict=True)
    except ValidationError as error:
        raise refusal(error, sender) from None
    names = [f"{_DIFFERENCE}{number}" for number in range(len(told.about))]
    if len(told.digests) != len(names) + 1 or set(content.array_records) != set(names):
        found = f"{len(told.digests)} versions with the arrays {shown(sorted(content.array_records))}"
        raise incompatible(f"{sender} sent {found}", "there must be one difference to each version but the first")
    arrays = [{n: _values(array, sender) for n, array in content.array_records[name].items()} for name in names]
    return told.digests, [Packed(*each) for each in zip(arrays, told.about, strict=True)]


def info_of(content: RecordDict) -> Info:
    """Return a message's text and whole-number fields."""
    return dict(content.config_records[_INFO])


def metrics_of(content: RecordDict) -> Metrics:
    """Return a message's numeric fields."""
    return dict(content.metric_records[_METRICS].items())


def fields_of(content: RecordDict, schema: type[AnyFields], sender: str) -> AnyFields:
    """Return a message's texts and whole numbers by a schema; those of its payload are left out.

    Args:
        content: A request's or a reply's content.
        schema: Its schema.
        sender: Name of the sender, for errors.
    """
    return checked(schema, {n: v for n, v in info_of(content).items() if n not in _OF_PAYLOADS}, sender)


def check_records(content: RecordDict, sender: str, *names: str) -> None:
    """Refuse a message with other records than those named and the payload's."""
    if other := sorted(set(content) - {*names, SHARED} - set(content.array_records)):
        raise incompatible(f"{sender} sent the records {shown(other)}", "no such record is known")


def payload_of(content: RecordDict, sender: str, expected: Expected | None = None) -> Payload:
    """Return a message's checked payload; its values are a read-only view of the message's bytes.

    Args:
        content: A request's or a reply's content.
        sender: Name of the sender, for errors.
        expected: What the payload must be; without it, a vector with any manifest is taken.
    """
    arrays = {f"{r}/{a}": array for r, record in content.array_records.items() for a, array in record.items()}
    info = {n: v for n, v in info_of(content).items() if n in _OF_PAYLOADS}
    packed = _PACKING in info
    if not arrays:
        if expected is not None:
            Payload.empty().check(expected.manifest, sender)
        if info:
            rule = "a message without weights has no such fields"
            raise incompatible(f"{sender} sent {shown(sorted(info))}", rule)
        return Payload.empty()
    if set(content.array_records) != {SHARED} or not (packed or set(arrays) == {f"{SHARED}/{SHARED}"}):
        raise incompatible(
            f"{sender} sent arrays {shown(sorted(arrays))}", "a message must contain exactly one payload"
        )
    values = {name: _values(array, sender) for name, array in content.array_records[SHARED].items()}
    if packed:
        return _rebuilt(Packed(values, info), sender, expected)
    if unknown := sorted(info.keys() - {_MANIFEST}):
        raise incompatible(f"{sender} sent {shown(unknown)}", "weights that are not packed have no such fields")
    manifest, vector = _manifest(info, sender, expected), values[SHARED]
    if expected is not None:
        Payload(manifest, vector).check(expected.manifest, sender)
    if vector.dtype != np.float32 or vector.shape != (manifest.size,):
        raise incompatible(
            f"{sender} sent {vector.dtype}{list(vector.shape)}", f"its manifest says float32[{manifest.size}]"
        )
    if expected is not None and expected.packing.kind != "none" and np.isfinite(vector).all():
        # A client packs every update of finite numbers; another one is refused for its values.
        raise incompatible(
            f"{sender} sent an update that is not packed", f"the recipe's is {expected.packing.kind!r}"
        )
    return Payload(manifest, vector)


def masked_of(content: RecordDict, sender: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return a masked update: a read-only view of so many whole numbers of a type.

    Args:
        content: A reply's content.
        sender: Name of the sender, for errors.
        dtype: Their type.
        size: Their number.
    """
    info = {n: v for n, v in info_of(content).items() if n in _OF_PAYLOADS}
    arrays = dict(content.array_records.get(SHARED, ArrayRecord()))
    if info != {_PACKING: MASKED} or set(content.array_records) != {SHARED} or set(arrays) != {MASKED}:
        raise incompatible(f"{sender} sent an update that is not masked", "the recipe has secure aggregation")
    values = _values(arrays[MASKED], sender)
    if values.dtype != dtype or values.shape != (size,):
        raise incompatible(f"{sender} sent {values.dtype}{list(values.shape)}", f"it must be {dtype}[{size}]")
    return values


def _rebuilt(packed: Packed, sender: str, expected: Expected | None) -> Payload:
    """Return what was sent plus the packed update."""
    if expected is None:
        raise incompatible(
            f"{sender} sent a packed update", "this message has no weights that an update could change"
        )
    sent = expected.sent.check(expected.manifest, sender)
    return Payload(sent.manifest, sent.vector + unpack(packed, sent.size, expected.packing, sender))


def _values(array: Array, sender: str) -> NDArray[Any]:
    try:
        return _view(array)
    except Exception as error:  # bytes from another machine: NumPy's parser can raise errors of many types
        raise incompatible(
            f"{sender} sent an array that cannot be read ({error!r})",
            "arrays must be in NumPy's format, without objects",
        ) from error


def _view(array: Array) -> NDArray[Any]:
    """Return an array as a read-only view of the message's bytes; ``Array.numpy`` would copy them."""
    if array.stype != "numpy.ndarray":
        raise TypeError(f"it is serialized as {array.stype!r}")
    file = BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its header is not of version 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if (str(dtype), shape) != (array.dtype, tuple(array.shape)):
        raise ValueError("its header says another type or shape than its record")
    values = np.frombuffer(array.data, dtype, math.prod(shape), file.tell())  # refuses objects
    return values.reshape(shape, order="F" if by_columns else "C")


def _manifest(info: Info, sender: str, expected: Expected | None) -> Manifest:
    """Return a payload's manifest. An expected one is compared as text, and only another one is parsed."""
    known = None if expected is None else expected.text
    most = _LONGEST_MANIFEST if known is None else 2 * len(known) + ROOM
    try:
        unzip = zlib.decompressobj()
        text = unzip.decompress(info[_MANIFEST], most)
        if not unzip.eof or unzip.unused_data:
            raise ValueError("it is cut off, or too long")
        if expected is not None and text.decode() == known:
            return expected.manifest
        manifest = Manifest.from_json(text.decode())
        if not all(name.isprintable() for name in manifest.names):  # they are in files and on pages
            raise ValueError("a name has a character that cannot be printed")
        return manifest
    except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise incompatible(
            f"{sender} sent an array without a readable manifest ({error!r})",
            "a payload must have a list of its tensors",
        ) from error
