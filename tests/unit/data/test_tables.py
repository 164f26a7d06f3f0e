"""Rows in memory are read as the same rows in a file are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.config.data import GIVEN, DataConfig
from flexperts.data.sources import read_source
from flexperts.data.tables import given_source, keep_given, kept_given
from flexperts.errors import DataError

SOURCE = given_source("clinic", "train")
ROWS: list[dict[str, Any]] = [
    {"instruction": "Name it.", "context": None, "response": "ox", "ward": 3, "category": "a"},
    {"instruction": "Count it.", "context": "Two\nox\u00e9n.", "response": 7, "ward": 4, "category": "b"},
]


def as_list(rows: list[dict[str, Any]]) -> Any:
    return rows


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list([{**row, "response": str(row["response"])} for row in rows])


def as_pandas(rows: list[dict[str, Any]]) -> Any:
    import pandas

    frame = pandas.DataFrame([{**row, "response": str(row["response"])} for row in rows])
    frame["category"] = frame["category"].astype("category")
    frame.index = [f"patient {i}" for i in range(len(frame))]  # an index is not a column
    return frame


def as_arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist([{**row, "response": str(row["response"])} for row in rows])


def as_polars(rows: list[dict[str, Any]]) -> Any:
    polars = pytest.importorskip("polars")
    return polars.DataFrame([{**row, "response": str(row["response"])} for row in rows])


KINDS = (as_list, as_dataset, as_pandas, as_arrow, as_polars)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])
def test_rows_in_memory_are_the_rows_of_a_file(kind: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    told: list[str] = []
    found = read_source(SOURCE, {}, given={SOURCE: kind(ROWS)}, say=told.append)
    assert found == read_source(str(file), {})
    assert [row.where for row in found] == [f"{SOURCE}, row 1", f"{SOURCE}, row 2"]
    assert any("'ward'" in line for line in told)  # unused columns are told
    assert "patient" not in "".join(told)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])
def test_kept_rows_are_the_same_and_hold_no_unused_column(kind: Callable[..., Any], tmp_path: Path) -> None:
    given = {SOURCE: kind(ROWS)}
    keep_given(given, DataConfig(at_silos=True), tmp_path)
    kept = kept_given(tmp_path)
    assert read_source(SOURCE, {}, given=kept) == read_source(SOURCE, {}, given=given)
    assert kept == {SOURCE: tmp_path / "rows" / "clinic" / "train.jsonl"}
    assert "ward" not in kept[SOURCE].read_text()
    assert kept[SOURCE].stat().st_mode & 0o077 == 0


def test_bad_rows_stay_bad_when_they_are_kept(tmp_path: Path) -> None:
    bad: list[Any] = [
        {"instruction": "a", "response": value} for value in (True, [1], {"x": 1}, math.nan, object(), None, "")
    ]
    given = {SOURCE: [*ROWS, *bad, "no mapping", {"instruction": "a", "response": "b", "context": math.inf}]}
    keep_given(given, DataConfig(at_silos=True), tmp_path)
    both = [read_source(SOURCE, {}, on_bad_row="drop", given=its) for its in (given, kept_given(tmp_path))]
    assert both[0] == both[1]
    assert len(both[0]) == len(ROWS)


def test_numbers_of_numpy_are_text() -> None:
    import numpy

    rows = [{"instruction": numpy.int64(12), "response": numpy.float32(0.5)}]
    [row] = read_source(SOURCE, {}, given={SOURCE: rows})
    assert (row.instruction, row.response) == ("12", "0.5")


def test_a_row_of_the_wrong_kind_is_named_and_not_shown() -> None:
    with pytest.raises(DataError, match=r"row 2") as caught:
        read_source(SOURCE, {}, given={SOURCE: [ROWS[0], "a secret text"]})
    assert "secret" not in str(caught.value)


def test_a_column_of_mixed_values_is_named_and_not_shown() -> None:
    import pandas

    frame = pandas.DataFrame({"instruction": ["a", "b"], "response": [7, "a secret text"]}, dtype=object)
    with pytest.raises(DataError, match="column 'response'") as caught:
        read_source(SOURCE, {}, given={SOURCE: frame})
    assert "secret" not in str(caught.value)


def test_columns_with_one_name_are_refused() -> None:
    import pandas

    frame = pandas.DataFrame([["a", "b", "c"]], columns=["instruction", "response", "response"])
    with pytest.raises(DataError, match="column names must be unique"):
        read_source(SOURCE, {}, given={SOURCE: frame})


@pytest.mark.parametrize("rows", [7, None, "text", iter(ROWS), object()], ids=lambda rows: type(rows).__name__)
def test_other_objects_are_refused_by_their_type(rows: Any) -> None:
    with pytest.raises(DataError, match=type(rows).__name__):
        read_source(SOURCE, {}, given={SOURCE: rows})


def test_empty_rows_are_refused() -> None:
    with pytest.raises(DataError, match="at least one row"):
        read_source(SOURCE, {}, given={SOURCE: []})


def test_rows_that_are_not_given_again_are_asked_for() -> None:
    with pytest.raises(DataError, match="given from Python, and the run does not keep them"):
        read_source(f"{GIVEN}clinic/train", {})
