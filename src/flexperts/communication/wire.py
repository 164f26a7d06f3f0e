"""Messages between processes of one machine: Flower's records as one safetensors value with JSON in it.

Arrays are tensors and keep their types; everything else is JSON under one metadata key. Nothing is pickled, and
neither side needs torch to read a message.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from flexperts.errors import FederationError

_FORMAT = "flexperts-message-1"
_LENGTH = 8
"""Bytes before a safetensors header that hold its length."""
_BYTES = "base64"

Fields = dict[str, str]
Tensors = dict[str, NDArray[Any]]


def serialize(fields: Mapping[str, str], content: RecordDict | None = None) -> bytes:
    """Return texts and records as bytes."""
    tensors: Tensors = {}
    try:
        table = [[name, *_record(record, tensors)] for name, record in (content or RecordDict()).items()]
        return save(tensors, metadata={_FORMAT: json.dumps({"fields": dict(fields), "records": table})})
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise _unreadable(error) from error


def deserialize(message: bytes) -> tuple[Fields, RecordDict]:
    """Return the texts and records that ``serialize`` was given."""
    try:
        tensors = load(message)
        header = json.loads(message[_LENGTH : _LENGTH + int.from_bytes(message[:_LENGTH], "little")])
        value = json.loads(header["__metadata__"][_FORMAT])
        content = RecordDict()
        for name, kind, items in value["records"]:
            content[_text(name)] = _restored(kind, items, tensors)
        if tensors:
            raise ValueError("it has tensors that no record names")
        return {_text(n): _text(t) for n, t in value["fields"].items()}, content
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unreadable(error) from error


def _record(record: Any, tensors: Tensors) -> tuple[str, list[Any]]:
    """Return a record's kind and its items as JSON values; arrays are added to ``tensors`` under a number."""
    if isinstance(record, ArrayRecord):
        return "arrays", [[name, _stored(array, tensors)] for name, array in record.items()]
    kind = "metrics" if isinstance(record, MetricRecord) else "config"
    return kind, [[name, _plain(value)] for name, value in record.items()]


def _stored(array: Array, tensors: Tensors) -> str:
    values = array.numpy()
    # safetensors writes memory as it is, so it must be in C order and little-endian.
    tensors[key := str(len(tensors))] = np.asarray(values, dtype=values.dtype.newbyteorder("<"), order="C")
    return key


def _restored(kind: str, items: Any, tensors: Tensors) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind == "arrays":
        # Each tensor belongs to one name: otherwise a small message could become a large one.
        return ArrayRecord({_text(name): Array(tensors.pop(key)) for name, key in items})
    values = {_text(name): _value(plain) for name, plain in items}
    if kind == "metrics":
        return MetricRecord(values)
    if kind == "config":
        return ConfigRecord(values)
    raise TypeError(f"{kind!r} is not a kind of record")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return {_BYTES: base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(one) for one in plain]
    return base64.b64decode(plain[_BYTES], validate=True) if isinstance(plain, dict) else plain


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    return value


def _unreadable(error: Exception) -> FederationError:
    return FederationError(
        f"a message between relay and worker ({type(error).__name__})",
        "it must hold named arrays, numbers and texts as flexperts writes them",
        "use one flexperts version for worker and SuperNode",
    )
