"""Tables as text: where rows end is certain, or the file is refused with a line; nothing is merged in silence."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.data.delimited import read_delimited
from flexperts.data.rows import Row
from flexperts.data.sources import read_source
from flexperts.errors import DataError

HEAD = "instruction,response\n"
REOPENED = "a quote opens a cell here, and text follows the quote that closes it (line"


def read(folder: Path, text: str, name: str = "rows.csv", **how: object) -> tuple[list[Row], list[str]]:
    notes: list[str] = []
    (folder / name).write_bytes(text.encode())
    rows = read_source(str(folder / name), {}, say=notes.append, **how)  # type: ignore[arg-type]
    return rows, [note.removeprefix(f"{folder / name}: ") for note in notes]


def refusal(folder: Path, text: str, name: str = "rows.csv") -> str:
    with pytest.raises(DataError) as caught:
        read(folder, text, name)
    return str(caught.value).removeprefix(str(folder / name))


def answers(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.instruction, row.response) for row in rows]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('q1,a1\nq2,"a2 begins a quote\nq3,a3\n', ", line 3: a quote opens a cell here and is never closed"),
        ('q1,a1\nq2,a2\n"q3,a3', ", line 4: a quote opens a cell here and is never closed"),
        ('"q1\nand on",a1\r\nq2,"a2', ", line 4: a quote opens a cell here and is never closed"),
        ('q1,"a\nb"\n"q\nr","x\ny\nz\n', ", line 5: a quote opens a cell here and is never closed"),
        ('q1,"a1" and more\nq2,a2\n', f", line 2: {REOPENED} 2)"),
        ('q1,"a1\nq2,"a2"\nq3,a3\n', f", line 2: {REOPENED} 3)"),
        ('q1,"say \\"hi\\""\n', f", line 2: {REOPENED} 2)"),
        ('q1,"a1"""b"\n', f", line 2: {REOPENED} 2)"),
    ],
)  # fmt: skip
def test_quotes_that_do_not_tell_where_rows_end(tmp_path: Path, body: str, said: str) -> None:
    assert refusal(tmp_path, HEAD + body).startswith(said)
    with pytest.raises(DataError):  # whatever follows is in doubt, so nothing can be left out either
        read(tmp_path, HEAD + body, on_bad_row="drop")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('q2,a "good" answer', "an unquoted cell contains a quote"),
        ('q2,5" nails', "an unquoted cell contains a quote"),
        ("q2", "it has fewer cells than the 2 columns of the header"),
        ("q2,yes, of course", "it has more cells than the 2 columns of the header"),
        ("q2,a2,,x", "it has more cells than the 2 columns of the header"),
        ("q2,", "response is empty"),
        (',"a2"', "instruction is empty"),
        ('q2," \n "', "response is empty"),
    ],
)
def test_a_row_that_is_bad_is_named_and_may_be_left_out(tmp_path: Path, row: str, said: str) -> None:
    text = f"{HEAD}\nq1,a1\n{row}\nq3,a3\n"
    assert refusal(tmp_path, text).startswith(f", line 4, row 2: {said}: ")
    rows, notes = read(tmp_path, text, on_bad_row="drop")
    assert answers(rows) == [("q1", "a1"), ("q3", "a3")]
    line = 5 + row.count("\n")
    assert rows[1].where == f"{tmp_path / 'rows.csv'}, line {line}, row 3"
    assert notes == [f"1 of 3 rows are left out (data.on_bad_row = 'drop'): line 4, row 2: {said}"]


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ('q1,a1\nq2,"a2 begins\nq3,a3"\nq4,a4\n', "line 3"),
        ('q1,"a1\nq2,a2\nq3,a3"\n', "line 2"),
        ('q1,"a1\r\nq2,\r\n"\nq3,a3\nq4,"x\nq5,y"', "line 2, 6"),
    ],
)
def test_a_quote_that_another_row_closes_is_told(tmp_path: Path, body: str, lines: str) -> None:
    """It is legal, so only its form gives it away: a line inside the cell that has a row's delimiters."""
    _, (note,) = read(tmp_path, HEAD + body)
    assert "look like separate rows" in note
    assert note.endswith(f"(rows that start at {lines})")


@pytest.mark.parametrize("cell", ["Dear Sir,\nthank you", "one\ntwo\nthree", "first\nyes, it is", "a\nb, c, d,e"])
def test_cells_of_several_lines_are_read_as_they_are(tmp_path: Path, cell: str) -> None:
    rows, notes = read(tmp_path, f'{HEAD}q1,"{cell}"\nq2,a2\n')
    assert (answers(rows), notes) == ([("q1", cell), ("q2", "a2")], [])


@pytest.mark.parametrize(
    ("header", "twice"),
    [
        ("instruction,response,response", "'response'"),
        ("instruction, response,response", "'response'"),
        ("id,instruction,id,response,id", "'id'"),
        ("instruction,response,context,instruction,context", "'instruction', 'context'"),
    ],
)
def test_a_column_that_comes_twice(tmp_path: Path, header: str, twice: str) -> None:
    said = refusal(tmp_path, f"{header}\n" + ",".join("a" for _ in header.split(",")))
    assert said.startswith(f": {twice}: column names must be unique")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "instruction;response\nq, 1;a\n"),
        ("rows.csv", '"instruction";"response"\r\n"q, 1";"a"\r\n'),
        ("rows.csv", "instruction\tresponse\nq, 1\ta\n"),
        ("rows.csv", 'sep=;\r\ninstruction;response\r\n"q, 1";a\r\n'),
        ("rows.csv", "sep=|\ninstruction|response\nq, 1|a\n"),
        ("rows.csv", "instruction;response;notes, if any\nq, 1;a;\n"),
        ("rows.tsv", "instruction\tresponse\nq, 1\ta\n"),
        ("rows.csv", 'instruction , response\n"q, 1",a\n'),
        ("rows.csv", '\n\ninstruction,response\n"q, 1",a\n'),
    ],
)
def test_delimiters_are_told_by_the_header(tmp_path: Path, name: str, text: str) -> None:
    assert answers(read(tmp_path, text, name)[0]) == [("q, 1", "a")]


@pytest.mark.parametrize(
    "text", ["instruction|response\nq|a\n", "q1\nq2\n", '"instruction, response"\n1\n', "a b\n1"]
)
def test_a_header_without_a_delimiter(tmp_path: Path, text: str) -> None:
    assert "cells are separated by commas, semicolons or tabs" in refusal(tmp_path, text)


def test_a_header_that_may_have_two_delimiters(tmp_path: Path) -> None:
    assert "its header may have comma or semicolon" in refusal(tmp_path, "question,long;answer\na,b;c\n")


@pytest.mark.parametrize(
    "text",
    [
        "instruction,response,,\nq1,a1,,\nq2,a2,,\n",
        "instruction,response\nq1,a1,,\nq2,a2\n",
        "instruction,response,\nq1,a1\nq2,a2, \n",
    ],
)
def test_empty_cells_beyond_the_columns_are_passed_over_and_told(tmp_path: Path, text: str) -> None:
    rows, notes = read(tmp_path, text)
    assert answers(rows) == [("q1", "a1"), ("q2", "a2")]
    assert notes == ["empty cells after the 2 named columns are ignored"]


def test_rows_without_any_text_are_told_and_blank_lines_are_not(tmp_path: Path) -> None:
    rows, notes = read(tmp_path, f"{HEAD}\n\nq1,a1\n,\n , \n\nq2,a2\n,\n")
    assert [row.where.split(", ", 1)[1] for row in rows] == ["line 4, row 1", "line 8, row 2"]
    assert notes == ["3 rows without any text are skipped (line 5, 6, 9)"]


def test_a_column_without_a_name_among_others(tmp_path: Path) -> None:
    """As pandas writes its index."""
    rows, notes = read(tmp_path, ",instruction,response\n0,q1,a1\n")
    assert (answers(rows), notes) == ([("q1", "a1")], ["unused columns: '(column 1)'"])


def test_a_table_without_a_header_does_not_show_its_first_row(tmp_path: Path) -> None:
    private = "The patient, who is known to us, has been coughing for weeks."
    assert "coughing" not in refusal(tmp_path, f'"{private}",yes\n"other",no\n')


CELLS = st.text(alphabet='ab,;\t "\n\ré', max_size=6)


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"])
)
def test_what_the_csv_module_writes_is_read(rows: list[tuple[str, ...]], delimiter: str, ending: str) -> None:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([("instruction", "context", "response"), *rows])
    table = read_delimited(Path("x.csv"), written.getvalue(), ("instruction", "response"), lambda _: None)
    found = [tuple(record.values.values()) for record in table.records(())]
    assert found == [row for row in rows if any(cell.strip() for cell in row)]


@given(st.text(alphabet='ab,"\n\r', max_size=30))
def test_what_is_read_without_complaint_the_csv_module_reads_too(body: str) -> None:
    """Where no rule is broken, both agree; the line of every row is where the text has it."""
    text = f"a,b\n{body}"
    try:
        table = read_delimited(Path("x.csv"), text, ("a", "b"), lambda _: None)
    except DataError:
        return
    records = list(table.records(()))
    if any(record.fault for record in records):
        return
    theirs = [
        row[:2] for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(c.strip() for c in row)
    ]
    assert [list(record.values.values()) for record in records] == theirs[1:]
    lines = re.split(r"\r\n?|\n", text)
    for record in records:
        line = int(re.findall(r"line (\d+)", record.place)[0])
        first = str(record.values["a"]).replace('"', '""')
        assert lines[line - 1].removeprefix('"').startswith(re.split(r"\r\n?|\n", first)[0])
