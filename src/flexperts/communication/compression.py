"""Packing a change of weights: half precision, 8 or 4 bits with a scale per block, the largest values only.

A change is trained minus sent, or one version of the shared weights minus the one before. Both sides rebuild it
from the packed arrays by the same fp32 products, so they get the same bits; ``error_feedback`` adds what packing
has lost to the next change.

The size of a packed change depends on nothing but the number of its values. Places of the largest values are
entropy-coded without loss: as one bit a value, of which a known share is set, they take as many bits as that
share's entropy, wherever the values are.

Sources: Seide et al., 2014 (error feedback, signs); Dettmers et al., 2022 (arXiv 2110.02861; a scale per block);
Stich et al., 2018 (arXiv 1809.07599; top-k with memory); Duda, 2013 (arXiv 1311.2540; the entropy coder).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from flexperts.config.federation import CompressionConfig
from flexperts.errors import FederationError, incompatible, shown
from flexperts.parameters.vector import Vector

_TOP = 127
"""Largest integer of int8 that is used, so that both signs reach as far."""
_TOP4 = 7
"""The same for 4 bits, where a value is stored as itself plus 8."""
_SPARE_WORDS = 2
"""Words of 32 bits that an entropy coder may need beyond the entropy."""
_Coder = constriction.stream.stack.AnsCoder
_HALF = 15
"""fp16 values are scaled to below 2^15: the largest is then far from overflow, the smallest from zero."""
_EXPONENTS = (-90, 130)
"""Allowed exponents of an fp16 scale: those of fp32 values, without those whose products become zero."""


@dataclass(frozen=True)
class Packed:
    """A packed change.

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
        "int4": lambda: _pack_int4(change, settings),
        "top_k": lambda: _pack_top_k(change, _kept(change.size, settings)),
        "top_k_int4": lambda: _pack_largest(change, settings, _pack_int4),
        "top_k_sign": lambda: _pack_largest(change, settings, _pack_signs),
    }
    packed = packers[settings.kind]()
    return replace(packed, about={"packing": settings.kind, **packed.about})


def packed_bytes(size: int, settings: CompressionConfig) -> int:
    """Return how many bytes the arrays of an update of ``size`` values take: packed, or fp32 for kind "none"."""
    if not size:
        return 0
    blocks, kept = -(-size // settings.block), _kept(size, settings)
    places, scales = 4 * _words(size, kept), 2 * -(-kept // settings.block)
    sizes = {
        "none": 4 * size,
        "fp16": 2 * size,
        "int8": size + 4 * blocks,
        "int4": -(-size // 2) + 2 * blocks,
        "top_k": (4 + 2) * kept,
        "top_k_int4": places + -(-kept // 2) + scales,
        "top_k_sign": places + -(-kept // 8) + scales,
    }
    return sizes[settings.kind]


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
    return Packed({"values": _to_half(change, exponent)}, {"exponent": exponent})


def _unpack_fp16(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    (values,) = _arrays(packed, sender, values=(np.float16, size))
    return _from_half(values, packed, sender)


def _pack_int8(change: Vector, block: int) -> Packed:
    """Scale each block by its largest value over 127 and round to whole numbers."""
    padded = _blocks(change, block)
    scales = (np.abs(padded).max(1) / np.float32(_TOP)).astype(np.float32)
    whole = np.divide(padded, scales[:, None], out=np.zeros_like(padded), where=scales[:, None] > 0)
    # A very small scale is itself rounded, and its values could then exceed the range.
    values = np.clip(np.rint(whole), -_TOP, _TOP).astype(np.int8).reshape(-1)[: change.size]
    return Packed({"values": values, "scales": scales}, {"block": block})


def _unpack_int8(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    block = _whole(packed, "block", settings.block, settings.block, sender)
    values, scales = _arrays(packed, sender, values=(np.int8, size), scales=(np.float32, -(-size // block)))
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise _unfit(sender, "scales that are negative or not finite", "scales must be finite and not negative")
    with np.errstate(over="ignore"):  # later, every update that is not finite is refused
        whole: Vector = values.astype(np.float32) * _repeated(scales, size, block)
    return whole


def _blocks(values: Vector, block: int) -> NDArray[np.float32]:
    """Return a copy with a block in each row, no longer than all values; the last one ends with zeros."""
    width = min(block, values.size)
    padded = np.zeros((-(-values.size // width), width), np.float32)
    padded.reshape(-1)[: values.size] = values
    return padded


def _repeated(scales: Vector, size: int, block: int) -> Vector:
    """Return every value's scale."""
    return np.repeat(scales, min(block, size))[:size]


def _pack_int4(values: Vector, settings: CompressionConfig) -> Packed:
    """Scale each block by its largest value over 7 and round to whole numbers, two in a byte."""
    padded, exponent = _blocks(values, settings.block), _exponent(values)
    halves = _to_half(np.abs(padded).max(1) / np.float32(_TOP4), exponent)
    scales = _scales(halves, exponent)[:, None]
    whole = np.divide(padded, scales, out=np.zeros_like(padded), where=scales > 0)
    codes = np.full(values.size + values.size % 2, _TOP4 + 1, np.uint8)
    codes[: values.size] = (np.clip(np.rint(whole), -_TOP4, _TOP4) + (_TOP4 + 1)).reshape(-1)[: values.size]
    return Packed({"pairs": codes[::2] | codes[1::2] << 4, "scales": halves}, {"exponent": exponent})


def _unpack_int4(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    (pairs,), scales = _scaled(packed, size, settings, sender, pairs=(np.uint8, -(-size // 2)))
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)
    if not codes.all() or (codes[size:] != _TOP4 + 1).any():
        raise _unfit(sender, "4 bits that are no value", "they must be from 1 to 15, and 8 after the last value")
    with np.errstate(over="ignore"):
        values: Vector = (codes[:size].astype(np.float32) - (_TOP4 + 1)) * scales
    return values


def _pack_signs(values: Vector, settings: CompressionConfig) -> Packed:
    """Keep the signs, and each block's mean magnitude, which has the least squared error."""
    padded, exponent = _blocks(values, settings.block), _exponent(values)
    counts = np.full(*padded.shape)
    counts[-1] -= padded.size - values.size
    means = (np.abs(padded).sum(1, dtype=np.float64) / counts).astype(np.float32)
    halves = _to_half(means, exponent)
    return Packed({"signs": np.packbits(values > 0), "scales": halves}, {"exponent": exponent})


def _unpack_signs(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    (signs,), scales = _scaled(packed, size, settings, sender, signs=(np.uint8, -(-size // 8)))
    bits = np.unpackbits(signs)
    if bits[size:].any():
        raise _unfit(sender, "signs after the last value", "the rest of the last byte must be zeros")
    return np.where(bits[:size], scales, -scales)


def _scaled(
    packed: Packed, size: int, settings: CompressionConfig, sender: str, **expected: tuple[type[Any], int]
) -> tuple[list[NDArray[Any]], Vector]:
    """Return the named arrays, and every value's scale."""
    *arrays, halves = _arrays(packed, sender, **expected, scales=(np.float16, -(-size // settings.block)))
    if not (np.isfinite(halves) & (halves >= 0)).all():
        raise _unfit(sender, "scales that are negative or not finite", "scales must be finite and not negative")
    exponent = _whole(packed, "exponent", *_EXPONENTS, sender)
    return arrays, _repeated(_scales(halves, exponent), size, settings.block)


def _scales(halves: NDArray[np.float16], exponent: int) -> Vector:
    with np.errstate(over="ignore"):  # later, every change that is not finite is refused
        scales: Vector = np.ldexp(halves.astype(np.float32), exponent)
    return scales


def _kept(size: int, settings: CompressionConfig) -> int:
    """Return how many values top_k keeps, at least one."""
    return max(1, round(settings.fraction * size))


def _pack_top_k(change: Vector, count: int) -> Packed:
    """Keep the values with the largest magnitudes, in the order of their positions."""
    kept = _largest(change, count)
    exponent = _exponent(change)
    indices, values = kept.astype(np.uint32), _to_half(change[kept], exponent)
    return Packed({"indices": indices, "values": values}, {"exponent": exponent})


def _unpack_top_k(packed: Packed, size: int, settings: CompressionConfig, sender: str) -> Vector:
    count = _kept(size, settings)
    values, indices = _arrays(packed, sender, values=(np.float16, count), indices=(np.uint32, count))
    places = indices.astype(np.int64)
    if places[-1] >= size or (np.diff(places) <= 0).any():
        raise _unfit(sender, f"indices up to {places.max()}", f"they must be below {size}, sorted and unique")
    change = np.zeros(size, np.float32)
    change[places] = _from_half(values, packed, sender)
    return change


def _largest(change: Vector, count: int) -> NDArray[np.int64]:
    """Return the positions of the values with the largest magnitudes, sorted."""
    return np.sort(np.argpartition(np.abs(change), change.size - count)[change.size - count :])


def _pack_largest(
    change: Vector, settings: CompressionConfig, pack_values: Callable[[Vector, CompressionConfig], Packed]
) -> Packed:
    """Keep the values with the largest magnitudes, packed, and their places, entropy-coded."""
    kept = _largest(change, _kept(change.size, settings))
    is_kept = np.zeros(change.size, np.int32)
    is_kept[kept] = 1
    places, coder = np.zeros(_words(change.size, kept.size), np.uint32), _Coder()
    if places.size:
        coder.encode_reverse(is_kept, _bit_model(kept.size, change.size))
        words = coder.get_compressed()
        places[: words.size] = words
    values = pack_values(change[kept], settings)
    return replace(values, arrays={"places": places, **values.arrays})


def _unpack_largest(
    packed: Packed,
    size: int,
    settings: CompressionConfig,
    sender: str,
    unpack_values: Callable[[Packed, int, CompressionConfig, str], Vector],
) -> Vector:
    count, arrays = _kept(size, settings), dict(packed.arrays)
    first = Packed({name: arrays.pop(name) for name in ("places",) if name in arrays}, {})
    (places,) = _arrays(first, sender, places=(np.uint32, _words(size, count)))
    is_kept = np.ones(size, bool)
    if places.size:
        words = np.trim_zeros(places, "b")  # a coder's last word is not zero
        is_kept = _Coder(words).decode(_bit_model(count, size), size).astype(bool)
    if (found := int(is_kept.sum())) != count:
        raise _unfit(sender, f"places of {found} values", f"{count} values of {size} are sent")
    change = np.zeros(size, np.float32)
    change[is_kept] = unpack_values(replace(packed, arrays=arrays), count, settings, sender)
    return change


def _bit_model(count: int, size: int) -> Any:
    """Return the entropy coder's model of a value: it is kept with the share of those that are."""
    return constriction.stream.model.Bernoulli(count / size, perfect=False)


def _words(size: int, count: int) -> int:
    """Return the words of 32 bits for the places of ``count`` among ``size`` values; none if all are sent."""
    if count == size:
        return 0
    share = count / size
    bits = -size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    return math.ceil(bits / 32) + _SPARE_WORDS


_UNPACKERS: Mapping[str, Callable[[Packed, int, CompressionConfig, str], Vector]] = {
    "fp16": _unpack_fp16,
    "int8": _unpack_int8,
    "int4": _unpack_int4,
    "top_k": _unpack_top_k,
    "top_k_int4": partial(_unpack_largest, unpack_values=_unpack_int4),
    "top_k_sign": partial(_unpack_largest, unpack_values=_unpack_signs),
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
