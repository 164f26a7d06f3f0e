"""What is written as JSON is JSON: null stands where a number is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.files import json_text, opened, sealed, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        ([1.5, math.inf, -math.inf, (math.nan,)], [1.5, None, None, [None]]),
        ({"a": {"b": math.nan, "c": 0.0}, "d": "NaN"}, {"a": {"b": None, "c": 0.0}, "d": "NaN"}),
    ],
)
def test_null_stands_for_what_is_no_number(value: Any, expected: Any, tmp_path: Path) -> None:
    assert strict(json_text(value)) == expected
    write_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text()) == expected


@given(VALUES)
def test_every_value_is_written_as_json(value: Any) -> None:
    strict(json_text(value))


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
def test_a_sealed_record_fits_its_checksum_when_it_is_read_again(record: dict[str, Any]) -> None:
    record.pop("sha256", None)
    written = strict(json_text(sealed(record)))
    assert opened(Path("x"), written, needed=True) == strict(json_text(record))


def test_a_record_that_an_earlier_version_sealed_with_nan_is_still_read() -> None:
    old = '{"sha256": "%s", "nll": NaN}'
    import hashlib

    digest = hashlib.sha256(b'{"nll": NaN}').hexdigest()
    assert math.isnan(opened(Path("x"), json.loads(old % digest), needed=True)["nll"])
