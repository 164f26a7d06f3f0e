"""Packing a client's update: half precision, 8 bits with a scale per block, the largest values only.

An update is what training has changed: trained minus sent. Both sides rebuild it from the packed arrays by the same
fp32 products, so they get the same bits; ``error_feedback`` adds what packing has lost to the next round's update.

Sources: Seide et al., 2014 (error feedback); Dettmers et al., 2022 (arXiv 2110.02861; a scale per block); Stich et
al., 2018 (arXiv 1809.07599; top-k with memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexperts.config.federation import CompressionConfig
from flexperts.errors import FederationError, incompatible, shown
from flexperts.parameters.vector import Vector

_TOP = 127
"""Largest integer of int8 that is used, so that both signs reach as far."""
_HALF = 15
"""fp16 values are scaled to below 2^15: the largest is then far from overflow, the smallest from zero."""
_EXPONENTS = (-90, 130)
"""Allowed exponents of an fp16 scale: those of fp32 values, without those whose products become zero."""


@dataclass(frozen=True)
class Packed:
    """A packed update.

    Args:
        arrays: What is sent in place of the fp32 vector, by name.
        about: What rebuilding also needs: ``packing``, and the number that belongs to this packing.
    """

    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, str | int]


def pack(change: Vector, settings: CompressionConfig) -> Packed:
    """Pack an update of finite values, at least one.

    Args:
        change: Trained minus sent.
        settings: The kind, which must not be "none", and its number.
    """
    packers: dict[str, Callable[[], Packed]] = {
        "fp16": lambda: _pack_fp16(change),
        "int8": lambda: _pack_int8(change, settings.block),
        "top_k": lambda: _pack_top_k(change, _kept(change.size, settings)),
    }
    return packers[settings.kind]()


def packed_bytes(size: int, settings: CompressionConfig) -> int:
    """Return how many bytes the arrays of an update of ``size`` values take: packed, or fp32 for kind "none"."""
    scales = -(-size // settings.block)
    top = (4 + 2) * _kept(size, settings)
    sizes = {"none": 4 * size, "fp16": 2 * size, "int8": size + 4 * scales, "top_k": top}
    return sizes[settings.kind] if size else 0


def unpack(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    """Rebuild an update of ``size`` values.

    Args:
        packed: What was sent; it must be what ``pack`` makes of such an update by these settings, and its types and
            sizes are checked before anything is expanded.
        size: Values of the update.
        settings: The recipe's packing.
        sender: Who sent it, for errors.
    """
    kind = packed.about.get("packing")
    if kind != settings.kind or settings.kind not in _UNPACKERS:
        raise _unfit(sender, f"packing {shown(kind)}", f"the recipe's is {settings.kind!r}")
    if unknown := sorted(packed.about.keys() - {"packing", "block" if kind == "int8" else "exponent"}):
        raise _unfit(sender, f"the fields {shown(unknown)}", "this packing has no such fields")
    return _UNPACKERS[settings.kind](packed, size, settings, sender)


def _pack_fp16(change: Vector) -> Packed:
    exponent = _exponent(change)
    return Packed({"values": _to_half(change, exponent)}, {"packing": "fp16", "exponent": exponent})


def _unpack_fp16(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    (values,) = _arrays(packed, sender, values=(np.float16, size))
    return _from_half(values, packed, sender)


def _pack_int8(change: Vector, block: int) -> Packed:
    """Scale each block by its largest value over 127 and round to whole numbers."""
    padded = np.zeros((-(-change.size // block), block), np.float32)
    padded.reshape(-1)[: change.size] = change
    scales = (np.abs(padded).max(1) / np.float32(_TOP)).astype(np.float32)
    whole = np.divide(padded, scales[:, None], out=np.zeros_like(padded), where=scales[:, None] > 0)
    # A very small scale is itself rounded, and its values could then exceed the range.
    values = np.clip(np.rint(whole), -_TOP, _TOP).astype(np.int8).reshape(-1)[: change.size]
    return Packed({"values": values, "scales": scales}, {"packing": "int8", "block": block})


def _unpack_int8(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    block = _whole(packed, "block", settings.block, settings.block, sender)
    values, scales = _arrays(packed, sender, values=(np.int8, size), scales=(np.float32, -(-size // block)))
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise _unfit(sender, "scales that are negative or not finite", "scales must be finite and not negative")
    with np.errstate(over="ignore"):  # later, every update that is not finite is refused
        whole: Vector = values.astype(np.float32) * np.repeat(scales, block)[:size]
    return whole


def _kept(size: int, settings: CompressionConfig) -> int:
    """Return how many values top_k keeps, at least one."""
    return max(1, round(settings.fraction * size))


def _pack_top_k(change: Vector, count: int) -> Packed:
    """Keep the values with the largest magnitudes, in the order of their positions."""
    kept = np.sort(np.argpartition(np.abs(change), change.size - count)[change.size - count :])
    exponent = _exponent(change)
    indices, values = kept.astype(np.uint32), _to_half(change[kept], exponent)
    return Packed({"indices": indices, "values": values}, {"packing": "top_k", "exponent": exponent})


def _unpack_top_k(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    count = _kept(size, settings)
    values, indices = _arrays(packed, sender, values=(np.float16, count), indices=(np.uint32, count))
    places = indices.astype(np.int64)
    if places[-1] >= size or (np.diff(places) <= 0).any():
        raise _unfit(sender, f"indices up to {places.max()}", f"they must be below {size}, sorted and unique")
    change = np.zeros(size, np.float32)
    change[places] = _from_half(values, packed, sender)
    return change


_UNPACKERS: Mapping[str, Callable[[Packed, int, CompressionConfig, str], Vector]] = {
    "fp16": _unpack_fp16,
    "int8": _unpack_int8,
    "top_k": _unpack_top_k,
}


def _exponent(change: Vector) -> int:
    """Return the power of two by which values are divided for fp16; this division is exact."""
    _, exponent = math.frexp(float(np.abs(change).max()))
    return max(exponent - _HALF, _EXPONENTS[0])


def _to_half(change: Vector, exponent: int) -> NDArray[np.float16]:
    return np.ldexp(change, -exponent).astype(np.float16)


def _from_half(values: NDArray[np.float16], packed: Packed, sender: str) -> Vector:
    exponent = _whole(packed, "exponent", *_EXPONENTS, sender)
    with np.errstate(over="ignore"):
        change: Vector = np.ldexp(values.astype(np.float32), exponent)
    return change


def _arrays(packed: Packed, sender: str, **expected: tuple[type[Any], int]) -> list[NDArray[Any]]:
    """Return the named arrays; refuse others, and arrays that are not flat or not of the given types and sizes."""
    if set(packed.arrays) != set(expected):
        raise _unfit(sender, f"arrays {shown(sorted(packed.arrays))}", f"this packing needs {sorted(expected)}")
    for name, (kind, size) in expected.items():
        array = packed.arrays[name]
        if array.dtype != kind or array.shape != (size,):
            rule = f"{name} must be {kind.__name__}[{size}]"
            raise _unfit(sender, f"{name} {array.dtype}{list(array.shape)}", rule)
    return [packed.arrays[name] for name in expected]


def _whole(packed: Packed, name: str, least: int, most: int, sender: str) -> int:
    value = packed.about.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        allowed = f"{least}" if least == most else f"a whole number from {least} to {most}"
        raise _unfit(sender, f"{name} = {shown(value)}", f"it must be {allowed}")
    return value


def _unfit(sender: str, value: str, rule: str) -> FederationError:
    return incompatible(f"{sender} sent {value} in a packed update", rule)
