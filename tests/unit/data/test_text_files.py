"""Bytes to text: what is certain is read, what is not is refused with the remedy that fits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from flexperts.data.rows import Row
from flexperts.data.sources import read_source
from flexperts.errors import DataError

ROW = Row("Was ist Zoë?", "eine Ärztin 患者", passage="Was ist Zoë?")
TEXTS = {
    "csv": f"instruction,response\n{ROW.instruction},{ROW.response}\n",
    "tsv": f"instruction\tresponse\n{ROW.instruction}\t{ROW.response}\n",
    "jsonl": json.dumps({"instruction": ROW.instruction, "response": ROW.response}, ensure_ascii=False),
    "json": json.dumps([{"instruction": ROW.instruction, "response": ROW.response}], ensure_ascii=False),
}
kinds = pytest.mark.parametrize("kind", TEXTS)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_source(str(path), {})
    return str(caught.value).removeprefix(f"{path}: ")


@kinds
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_say_what_they_are(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(TEXTS[kind].encode(encoding))
    assert read_source(str(path), {}) == [ROW]
    big = b"\xfe\xff" + TEXTS[kind].encode("utf-16-be")
    path.write_bytes(big)
    assert read_source(str(path), {}) == [ROW]


@kinds
@pytest.mark.parametrize("ending", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_files_are_told_by_their_first_bytes(tmp_path: Path, kind: str, ending: str, packed: bool) -> None:
    path = tmp_path / f"rows.{kind}{ending}"
    content = TEXTS[kind].encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_source(str(path), {}) == [ROW]


@pytest.mark.parametrize("cut", [5, 20, -1, -8])
def test_a_packed_file_that_is_cut(tmp_path: Path, cut: int) -> None:
    said = refusal(tmp_path / "rows.jsonl.gz", gzip.compress(TEXTS["jsonl"].encode())[:cut])
    assert said.startswith("it is not a readable gzip file")


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        ("ä,Größe\n", "latin-1", "it is not UTF-8 text (line 2); it looks like Windows-1252 or Latin-1"),
        ("naïve question,“quoted”\n", "cp1252", "it is not UTF-8 text (line 2); it looks like Windows-1252"),
        ("q,a\n" * 50 + "el niño,sí\n", "latin-1", "it is not UTF-8 text (line 52); it looks like Windows-1252"),
        ("Что это,Это больница\n", "cp1251", "it is not UTF-8 text (line 2); save it as UTF-8"),
        ("患者は薬を,毎日飲む\n", "shift-jis", "it is not UTF-8 text (line 2); save it as UTF-8"),
        ("患者需要每天,服药两次\n", "gb18030", "it is not UTF-8 text (line 2); save it as UTF-8"),
        ("Zoë ist da,ja\n", "utf-16-le", "it looks like UTF-16 without a byte order mark"),
        ("Is it there,yes\n", "utf-16-be", "it looks like UTF-16 without a byte order mark"),
    ],
)
def test_encodings_that_cannot_be_told_get_a_remedy(tmp_path: Path, text: str, encoding: str, said: str) -> None:
    found = refusal(tmp_path / "rows.csv", f"instruction,response\n{text}".encode(encoding))
    assert found.replace(": it looks", "; it looks").startswith(said)
    assert ("iconv -f WINDOWS-1252" in found) == ("looks like Windows-1252" in said)
    assert "save it as UTF-8" in found


def test_a_file_of_two_encodings_is_not_to_be_converted_as_a_whole(tmp_path: Path) -> None:
    content = "instruction,response\nGröße,Länge\nHöhe,Ärzte\n".encode() + "Fuß,Maß\n".encode("latin-1")[:3]
    said = refusal(tmp_path / "rows.csv", content)
    assert said.startswith("it is not UTF-8 text (line 4), though most of the file is; correct that line")
    assert "iconv" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04\x14\x00", "it is a zip archive or an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "it is an old Excel workbook"),
        (b"PAR1\x15\x04", "it is a Parquet file"),
        (b"\xff\xfeq\x00,", "it starts as UTF-16 text, but is not valid UTF-16 throughout"),
    ],
)
def test_other_kinds_of_files_under_a_texts_name(tmp_path: Path, content: bytes, said: str) -> None:
    for kind in TEXTS:
        assert refusal(tmp_path / f"rows.{kind}", content).startswith(said)


@kinds
def test_zero_bytes(tmp_path: Path, kind: str) -> None:
    content = b"\n" + TEXTS[kind].encode() + b"\n\0\0\0"
    said = refusal(tmp_path / f"rows.{kind}", content)
    line = content.count(b"\n") + 1
    assert f", line {line}: it contains zero bytes" in said


def test_characters_that_a_conversion_lost_are_told(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "rows.csv").write_text("instruction,response\nq1,M\ufffdller\nq2,a\n", encoding="utf-8")
    read_source(str(tmp_path / "rows.csv"), {}, say=notes.append)
    assert notes == [
        f"{tmp_path / 'rows.csv'}: 1 rows contain U+FFFD, which replaces a character that a conversion lost"
    ]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp949", "김민지 환자의 진료 기록"),
        ("cp932", "患者さんの記録です"),
        ("cp932", "カルテ"),
        ("gb18030", "病人的记录"),
        ("cp1251", "история болезни"),
    ],
)
def test_text_of_other_scripts_is_not_taken_for_western(tmp_path: Path, encoding: str, text: str) -> None:
    said = refusal(tmp_path / "rows.csv", f"instruction,response\nquestion about records,{text}\n".encode(encoding))
    assert "it is not UTF-8 text (line 2)" in said
    assert "WINDOWS-1252" not in said
    assert "look at the result" in said
