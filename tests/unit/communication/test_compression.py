"""Packed updates: how far they are from what was packed, that both sides rebuild the same, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexperts.communication.compression import Packed, pack, packed_bytes, unpack
from flexperts.communication.messages import Expected, info_of, payload_of, records
from flexperts.communication.schema import check_size
from flexperts.communication.traffic import encoded_bytes, personal_bytes
from flexperts.config.federation import CompressionConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, Payload, Vector

FLOATS = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-1, 1, width=32)
EVERY = ["fp16", "int8", "int4", "top_k", "top_k_int4", "top_k_sign"]
CHANGES = arrays(np.float32, st.integers(1, 40), elements=FLOATS)


def settings(kind: str, **given: Any) -> CompressionConfig:
    return CompressionConfig(kind=kind, **given)


def there_and_back(change: Vector, kind: str, **given: Any) -> Vector:
    chosen = settings(kind, **given)
    return unpack(pack(change, chosen), change.size, chosen, "bank")


@given(CHANGES)
def test_fp16_is_off_by_half_a_step_of_eleven_bits(change: Vector) -> None:
    """Relative to each value, or for values 2^29 times smaller than the largest, to the largest."""
    got = there_and_back(change, "fp16")
    largest = np.abs(change.astype(np.float64)).max()
    bound = np.maximum(np.abs(change.astype(np.float64)) * 2.0**-11, largest * 2.0**-39) + 2.0**-115
    assert got.dtype == np.float32
    assert (np.abs(got.astype(np.float64) - change) <= bound).all()


@given(CHANGES, st.integers(1, 50))
def test_int8_is_off_by_half_a_step_of_its_block(change: Vector, block: int) -> None:
    got = there_and_back(change, "int8", block=block)
    for start in range(0, change.size, block):
        ours, theirs = (v[start : start + block].astype(np.float64) for v in (change, got))
        step = np.abs(ours).max() / 127
        assert (np.abs(ours - theirs) <= step * (0.5 + 1e-4) + 2.0**-142).all()


@given(CHANGES, st.sampled_from(EVERY), st.integers(1, 50), st.floats(0.01, 1.0))
def test_sizes_are_told_without_packing(change: Vector, kind: str, block: int, fraction: float) -> None:
    chosen = settings(kind, block=block, fraction=fraction)
    assert packed_bytes(change.size, chosen) == sum(a.nbytes for a in pack(change, chosen).arrays.values())
    assert packed_bytes(change.size, settings("none")) == change.nbytes
    assert packed_bytes(0, chosen) == 0


@given(CHANGES, st.floats(0.01, 1.0))
def test_top_k_keeps_the_largest_and_nothing_else(change: Vector, fraction: float) -> None:
    chosen = settings("top_k", fraction=fraction)
    packed = pack(change, chosen)
    got, kept = unpack(packed, change.size, chosen, "bank"), packed.arrays["indices"]
    assert len(kept) == max(1, round(fraction * change.size))
    dropped = np.setdiff1d(np.arange(change.size), kept)
    assert not got[dropped].any()
    if len(dropped):
        assert np.abs(change[kept]).min() >= np.abs(change[dropped]).max()
    np.testing.assert_array_equal(got[kept], there_and_back(change[kept], "fp16"))


@given(CHANGES, st.integers(1, 50))
def test_int4_is_off_by_half_a_step_of_its_block(change: Vector, block: int) -> None:
    """A step is a 7th of the block's largest value, itself rounded to fp16."""
    got = there_and_back(change, "int4", block=block).astype(np.float64)
    largest = np.abs(change.astype(np.float64)).max()
    for start in range(0, change.size, block):
        ours, theirs = (v[start : start + block].astype(np.float64) for v in (change, got))
        step = np.abs(ours).max() / 7
        assert (np.abs(ours - theirs) <= step * (0.5 + 7 * 2.0**-10) + largest * 2.0**-36 + 2.0**-100).all()


@given(CHANGES, st.integers(1, 50))
def test_signs_lose_what_the_mean_magnitude_does_not_hold(change: Vector, block: int) -> None:
    """The squared error of a block is its sum of squares minus n mean^2, the least of all common magnitudes."""
    got = there_and_back(change, "top_k_sign", block=block, fraction=1.0).astype(np.float64)
    largest = np.abs(change.astype(np.float64)).max()
    for start in range(0, change.size, block):
        ours, theirs = (v[start : start + block].astype(np.float64) for v in (change, got))
        mean = np.abs(ours).mean()
        bound = largest * 2.0**-36 + 2.0**-100
        np.testing.assert_allclose(np.abs(theirs), mean, rtol=2.0**-10, atol=bound)
        assert (np.sign(ours[ours != 0]) * theirs[ours != 0] >= 0).all()


@given(CHANGES, st.sampled_from(["top_k_int4", "top_k_sign"]), st.integers(1, 50), st.floats(0.01, 1.0))
def test_the_largest_values_are_packed_as_if_they_were_alone(
    change: Vector, kind: str, block: int, fraction: float
) -> None:
    got, top = (there_and_back(change, k, block=block, fraction=fraction) for k in (kind, "top_k"))
    kept = pack(change, settings("top_k", fraction=fraction)).arrays["indices"]
    alone = ("int4", 1.0) if kind == "top_k_int4" else ("top_k_sign", 1.0)
    expected = there_and_back(change[kept], alone[0], block=block, fraction=alone[1])
    np.testing.assert_array_equal(got[kept], expected)
    assert not np.delete(got, kept).any()
    assert got.shape == top.shape


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5, 0.98])
def test_places_take_their_entropy_wherever_they_are(share: float) -> None:
    """And without loss; the same number of bytes for values in a row as for values all over."""
    size, stream = 50_000, np.random.default_rng(0)
    count = round(share * size)
    entropy = -size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    chosen = settings("top_k_sign", fraction=share)
    for places in (np.arange(count), np.arange(size - count, size), np.sort(stream.permutation(size)[:count])):
        change = np.full(size, 1e-9, np.float32)
        change[places] = stream.normal(3, 0.1, count)
        packed = pack(change, chosen)
        np.testing.assert_array_equal(np.flatnonzero(unpack(packed, size, chosen, "bank")), places)
        assert 0 <= packed.arrays["places"].nbytes - entropy <= 12


def test_four_bits_by_hand() -> None:
    change = np.array([7, -3.4, 0.2, 0, 1.4], np.float32)
    packed = pack(change, settings("int4", block=4))
    assert packed.arrays["pairs"].tolist() == [15 | (8 - 3) << 4, 8 | 8 << 4, 15 | 8 << 4]
    assert packed.about == {"packing": "int4", "exponent": -12}
    np.testing.assert_allclose(np.ldexp(packed.arrays["scales"].astype(float), -12), [1, 0.2], rtol=1e-3)
    np.testing.assert_allclose(unpack(packed, 5, settings("int4", block=4), "bank"), [7, -3, 0, 0, 1.4], rtol=1e-3)
    signs = pack(change, settings("top_k_sign", block=2, fraction=0.6))  # 7, -3.4 | 1.4
    assert signs.arrays["signs"].tolist() == [0b10100000]
    np.testing.assert_allclose(
        unpack(signs, 5, settings("top_k_sign", block=2, fraction=0.6), "bank"), [5.2, -5.2, 0, 0, 1.4], rtol=1e-3
    )


def test_by_hand() -> None:
    change = np.array([1.27, -0.5, 0.003, 0.0, 10.0, -20.0], np.float32)
    packed = pack(change, settings("int8", block=3))
    assert packed.arrays["values"].tolist() == [127, -50, 0, 0, 64, -127]
    np.testing.assert_allclose(packed.arrays["scales"], [0.01, 20 / 127], rtol=1e-6)
    third = settings("top_k", fraction=1 / 3)
    top = pack(change, third)
    assert top.arrays["indices"].tolist() == [4, 5]
    assert unpack(top, 6, third, "bank").tolist() == [0, 0, 0, 0, 10, -20]
    assert there_and_back(change, "fp16")[4:].tolist() == [10, -20]


@pytest.mark.parametrize("kind", EVERY)
def test_zeros_are_zeros(kind: str) -> None:
    assert there_and_back(np.zeros(7, np.float32), kind).tolist() == [0] * 7


@pytest.mark.parametrize("kind", ["int8", "int4", "top_k_int4", "top_k_sign"])
def test_memory_grows_with_the_values_and_not_with_the_block(kind: str) -> None:
    """A block of 2^40 values packs ten values to the bytes of a block of ten."""
    change = np.arange(1, 11, dtype=np.float32)
    large, small = (settings(kind, block=block, fraction=0.5) for block in (2**40, 10))
    packed, other = pack(change, large), pack(change, small)
    assert {n: a.tobytes() for n, a in packed.arrays.items()} == {n: a.tobytes() for n, a in other.arrays.items()}
    assert unpack(packed, 10, large, "bank").tobytes() == unpack(other, 10, small, "bank").tobytes()


def test_small_updates_keep_their_bits_in_half_precision() -> None:
    """Plain float16 would leave 3 bits of 1e-7 and lose 1e-9; after scaling all have 11."""
    change = np.array([3.1e-7, -1.7e-9, 8e-8], np.float32)
    np.testing.assert_allclose(there_and_back(change, "fp16"), change, rtol=2**-11)
    assert (np.abs(change.astype(np.float16) - change) / np.abs(change)).max() > 0.01


MANIFEST = Manifest(("a", "b"), ((300,), (20, 10)))
SENT = Payload(MANIFEST, np.random.default_rng(0).normal(size=500).astype(np.float32))
CHANGE = np.random.default_rng(1).normal(0, 1e-2, 500).astype(np.float32)
KINDS = [
    ("fp16", 2.0),
    ("int8", 1 + 4 / 256),
    ("top_k", 0.05 * 6),
    ("int4", 0.5 + 2 * 2 / 500),
    ("top_k_int4", (4 * 7 + 13 + 2) / 500),  # 500 H(0.05) = 143.2 bits are 5 words, and 2 are spare
    ("top_k_sign", (4 * 7 + 4 + 2) / 500),
]


@pytest.fixture(autouse=True)
def server() -> None:
    assume_identity(1)


def wanted(kind: str, sent: Payload = SENT) -> Expected:
    return Expected(sent.manifest, sent, settings(kind))


def message(packed: Packed) -> Any:
    return records({"client": "bank", "round": 1}, {"rows": 3}, Payload(MANIFEST, SENT.vector + CHANGE), packed)


@pytest.mark.parametrize(("kind", "per_value"), KINDS)
def test_the_server_rebuilds_the_clients_bits_from_a_smaller_message(kind: str, per_value: float) -> None:
    packed = pack(CHANGE, settings(kind))
    content = message(packed)
    got = payload_of(content, "bank", wanted(kind))
    expected = SENT.vector + unpack(packed, 500, settings(kind), "bank")
    assert got.manifest == MANIFEST
    assert got.vector.tobytes() == expected.tobytes()
    assert info_of(content)["client"] == "bank"
    arrays = content.array_records["shared"]
    assert sum(a.numpy().nbytes for a in arrays.values()) == pytest.approx(500 * per_value, abs=4)
    whole = encoded_bytes(records({"client": "bank", "round": 1}, {"rows": 3}, SENT))
    # What goes is 2000 bytes of values and the manifest; what comes are the arrays, headers and a few words.
    assert "manifest" not in info_of(content)
    assert encoded_bytes(content) - 500 * per_value <= whole - 2000 + 700 + 300 * max(0, len(arrays) - 2)


@pytest.mark.parametrize("given_", [{"kind": "top_k", "fraction": 1.0}, {"kind": "int8", "block": 1}])
def test_a_packed_reply_has_at_most_the_expected_bytes(given_: dict[str, Any]) -> None:
    """Also where packing takes more than fp32."""
    size, chosen = 100_000, CompressionConfig(**given_)
    sent = Payload(Manifest(("w",), ((size,),)), np.zeros(size, np.float32))
    packed = pack(np.arange(1, size + 1, dtype=np.float32), chosen)
    content = records({"client": "a"}, {"rows": 3}, sent, packed)
    check_size(content, Expected(sent.manifest, sent, chosen).most, "a")


def test_packing_does_not_hide_personal_bytes() -> None:
    """fp32 bytes are not in a packed message: the vector that it was made from is searched too."""
    import torch
    from torch.nn import Parameter

    secret = {"graft": Parameter(torch.from_numpy(CHANGE[40:80].copy()))}
    content = message(pack(CHANGE, settings("int8")))
    assert personal_bytes(content, secret) == 0
    assert personal_bytes(content, secret, CHANGE) == 160
    assert personal_bytes(content, {"graft": Parameter(torch.full((40,), 7.0))}, CHANGE) == 0


def test_a_packed_message_needs_what_it_changes() -> None:
    content = message(pack(CHANGE, settings("fp16")))
    with pytest.raises(FederationError, match="bank sent a packed update: this message has no weights"):
        payload_of(content, "bank")
    other = Payload(Manifest(("a",), ((499,),)), SENT.vector[:499])
    with pytest.raises(FederationError, match=r"bank sent values float16\[500\] in a packed update"):
        payload_of(content, "bank", wanted("fp16", other))


HALF, TOP, WHOLE = (pack(CHANGE, settings(kind)) for kind in ("fp16", "top_k", "int8"))


def changed(packed: Packed, **arrays: Any) -> Packed:
    return replace(packed, arrays={**packed.arrays, **arrays})


def about(packed: Packed, **about: Any) -> Packed:
    return replace(packed, about={**packed.about, **about})


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (about(HALF, packing="zip"), "packing 'zip'"),
        (about(HALF, packing=3), "packing 3"),
        (about(HALF, packing="int8"), "packing 'int8'"),
        (about(HALF, block=1), "the fields ['block']"),
        (replace(HALF, about={"packing": "fp16"}), "exponent = None"),
        (about(HALF, exponent=1.5), "exponent = 1.5"),
        (about(HALF, exponent=True), "exponent = True"),
        (about(HALF, exponent=500), "exponent = 500"),
        (about(HALF, exponent=-500), "exponent = -500"),
        (changed(HALF, values=CHANGE), "values float32[500]"),
        (changed(HALF, values=HALF.arrays["values"][:-1]), "values float16[499]"),
        (changed(HALF, values=HALF.arrays["values"].reshape(2, 250)), "values float16[2, 250]"),
        (changed(HALF, graft=CHANGE), "arrays ['graft', 'values']"),
        (about(WHOLE, block=0), "block = 0"),
        (about(WHOLE, block=128), "block = 128"),
        (about(WHOLE, block=2**31), "block = 2147483648"),
        (changed(WHOLE, scales=np.ones(1, np.float32)), "scales float32[1]"),
        (changed(WHOLE, scales=np.array([1, np.nan], np.float32)), "scales that are negative or not finite"),
        (changed(WHOLE, scales=np.array([np.inf, 1], np.float32)), "scales that are negative or not finite"),
        (changed(WHOLE, scales=np.array([-1, 1], np.float32)), "scales that are negative or not finite"),
        (changed(WHOLE, values=WHOLE.arrays["values"].astype(np.uint8)), "values uint8[500]"),
        (changed(TOP, indices=TOP.arrays["indices"][::-1].copy()), "indices up to"),
        (changed(TOP, indices=np.zeros(25, np.uint32)), "indices up to 0"),
        (changed(TOP, indices=np.arange(476, 501, dtype=np.uint32)), "indices up to 500"),
        (changed(TOP, indices=np.append(np.arange(24), 2**32 - 1).astype(np.uint32)), "indices up to 4294967295"),
        (changed(TOP, indices=TOP.arrays["indices"].astype(np.int64)), "indices int64[25]"),
        (changed(TOP, indices=TOP.arrays["indices"][:-1]), "indices uint32[24]"),
        (changed(TOP, **{n: a[:24] for n, a in TOP.arrays.items()}), "values float16[24]"),
        (changed(TOP, values=np.float16(1)), "values float16[]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(packed: Packed, said: str) -> None:
    kind = next(
        kind for kind, own in (("int8", "scales"), ("top_k", "indices"), ("fp16", "values")) if own in packed.arrays
    )
    with pytest.raises(FederationError) as caught:
        unpack(packed, 500, settings(kind), "bank")
    assert f"bank sent {said}" in str(caught.value)


FOUR, TOP_FOUR, SIGNS = (pack(CHANGE, settings(kind)) for kind in ("int4", "top_k_int4", "top_k_sign"))
ONES = np.full(7, 2**32 - 1, np.uint32)


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (about(FOUR, exponent=500), "exponent = 500"),
        (about(FOUR, block=256), "the fields ['block']"),
        (changed(FOUR, pairs=FOUR.arrays["pairs"][:-1]), "pairs uint8[249]"),
        (changed(FOUR, pairs=np.zeros(250, np.uint8)), "4 bits that are no value"),
        (changed(FOUR, scales=np.array([1, np.inf], np.float16)), "scales that are negative or not finite"),
        (changed(FOUR, scales=np.array([1, -1], np.float16)), "scales that are negative or not finite"),
        (changed(FOUR, scales=np.ones(2, np.float32)), "scales float32[2]"),
        (changed(TOP_FOUR, places=TOP_FOUR.arrays["places"][:-1]), "places uint32[6]"),
        (changed(TOP_FOUR, places=np.zeros(7, np.uint32)), "places of"),
        (changed(TOP_FOUR, places=ONES), "places of"),
        (changed(TOP_FOUR, pairs=TOP_FOUR.arrays["pairs"] | 0xF0), "4 bits that are no value"),
        (replace(TOP_FOUR, arrays={"places": TOP_FOUR.arrays["places"]}), "arrays []"),
        (replace(TOP_FOUR, arrays=FOUR.arrays), "arrays []"),
        (changed(SIGNS, signs=np.full(4, 255, np.uint8)), "signs after the last value"),
        (changed(SIGNS, signs=SIGNS.arrays["signs"][:-1]), "signs uint8[3]"),
        (changed(SIGNS, graft=CHANGE), "arrays ['graft', 'scales', 'signs']"),
    ],
)  # fmt: skip
def test_what_does_not_fit_few_bits_is_refused(packed: Packed, said: str) -> None:
    with pytest.raises(FederationError) as caught:
        unpack(packed, 500, settings(str(packed.about["packing"])), "bank")
    assert f"bank sent {said}" in str(caught.value)


@given(arrays(np.uint32, 7), st.integers(0, 2**32))
def test_whatever_places_come_are_decoded_or_refused(places: Any, seed: int) -> None:
    """An entropy decoder turns any bytes into places; their number gives wrong ones away, or they are places."""
    try:
        got = unpack(changed(SIGNS, places=places), 500, settings("top_k_sign"), "bank")
    except FederationError:
        return
    assert np.count_nonzero(got) == 25


@pytest.mark.parametrize("packed", [HALF, WHOLE, TOP])
def test_values_that_are_not_finite_come_out_so(packed: Packed) -> None:
    """The server refuses such an update as it refuses one that came bare."""
    chosen = settings(str(packed.about["packing"]))
    if packed is WHOLE:
        bad = changed(packed, scales=np.array([3e38, 1], np.float32))
        assert not np.isfinite(unpack(bad, 500, chosen, "bank")).all()
        return
    for value in (np.nan, np.inf):
        values = packed.arrays["values"].copy()
        values[3] = value
        assert (~np.isfinite(unpack(changed(packed, values=values), 500, chosen, "bank"))).sum() == 1
    assert np.isinf(unpack(about(packed, exponent=130), 500, chosen, "bank")).any()


@pytest.mark.parametrize("raw", [b"", b"\x93NUMPY", b"plain", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}"])
def test_bytes_that_are_no_array_are_refused(raw: bytes) -> None:
    from flwr.app import Array, ArrayRecord

    content = message(HALF)
    for info in (content, records({}, None, SENT)):
        name = "values" if info is content else "shared"
        info["shared"] = ArrayRecord({name: Array(dtype="float16", shape=(500,), stype="numpy.ndarray", data=raw)})
        with pytest.raises(FederationError, match="bank sent an array that cannot be read"):
            payload_of(info, "bank", wanted("fp16"))


LITTLE = arrays(st.sampled_from([np.float16, np.float32, np.int8, np.uint32, np.int64]), st.integers(0, 4))
WORDS = st.sampled_from(["fp16", "int8", "top_k", "", "zip"]) | st.integers(-3, 3) | st.floats() | st.binary()


@given(
    st.dictionaries(st.sampled_from(["values", "scales", "indices", "x"]), LITTLE, max_size=3),
    st.dictionaries(st.sampled_from(["packing", "block", "exponent", "round"]), WORDS),
)
def test_whatever_comes_is_rebuilt_or_refused(given_arrays: dict[str, Any], given_info: dict[str, Any]) -> None:
    sent = Payload(Manifest(("w",), ((3,),)), np.ones(3, np.float32))
    content = records({}, None, sent, Packed(given_arrays, {"packing": "fp16"} | given_info))
    try:
        got = payload_of(content, "bank", wanted("fp16", sent))
    except FederationError:
        return
    assert got.vector.dtype == np.float32
    assert got.vector.shape == ((3,) if given_arrays else (0,))
