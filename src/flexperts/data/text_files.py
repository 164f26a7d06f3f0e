"""Decoding of text files: a file is refused unless its compression and encoding are certain."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from pathlib import Path

from flexperts.errors import DataError

_GZIP = b"\x1f\x8b"
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark starts like it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHERS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file",
}
_WESTERN = re.compile(rb"(?<![\x80-\xff])[\x80\x85\x91-\x97\xa0-\xff]{1,2}(?![\x80-\xff])")
"""One or two letters or marks of Windows-1252; text of other scripts has longer runs, or other bytes."""
_SAVE = "save it as UTF-8 (spreadsheets call it CSV UTF-8)"


def decoded_text(path: Path) -> str:
    """Read a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; gzip by its first bytes."""
    content = _unpacked(path)
    for start, kind in _OTHERS.items():
        if content.startswith(start):
            raise DataError(f"{path}", f"it is {kind}, despite its extension", "save it as UTF-8 CSV or JSON lines")
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding in ("utf-8", "utf-8-sig") and b"\0" in content:
        raise _zeros(path, content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(path, content, encoding, error) from error


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        kind = "file" if isinstance(error, OSError) and error.errno else "gzip file"
        raise DataError(f"{path}", f"it is not a readable {kind} ({error})", "copy or compress it again") from error


def _undecodable(path: Path, content: bytes, encoding: str, error: UnicodeDecodeError) -> DataError:
    if encoding != "utf-8":
        name = encoding.removesuffix("-sig").upper()
        return DataError(f"{path}", f"it starts as {name} text, but is not valid {name} throughout", _SAVE)
    line = content.count(b"\n", 0, error.start) + 1
    found = f"it is not UTF-8 text (line {line})"
    text = content.decode(errors="replace")
    broken = text.count("\ufffd")
    whole = sum(1 for letter in text if letter > "\x7f") - broken
    if whole > broken:
        return DataError(
            f"{path}",
            f"{found}, though most of the file is",
            "correct that line: part of it was pasted from another encoding, or cut",
        )
    letters = sum(1 for letter in text if letter.isascii() and letter.isalpha())
    if 4 * broken <= letters and _is_western(content):
        convert = "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        return DataError(f"{path}", f"{found}; it looks like Windows-1252 or Latin-1", f"{_SAVE}, or: {convert}")
    convert = "iconv -f ITS-ENCODING -t UTF-8 FILE > NEW, with CP949, CP932, GB18030 or the like as ITS-ENCODING"
    return DataError(f"{path}", found, f"{_SAVE}, or convert it and look at the result: {convert}")


def _is_western(content: bytes) -> bool:
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return False
    beyond_ascii = sum(1 for byte in content if byte > 0x7F)
    return 2 * sum(map(len, _WESTERN.findall(content))) > beyond_ascii


def _zeros(path: Path, content: bytes) -> DataError:
    if 3 * content.count(b"\0") > len(content):
        return DataError(f"{path}", "it looks like UTF-16 without a byte order mark", _SAVE)
    line = content.count(b"\n", 0, content.index(b"\0")) + 1
    return DataError(
        f"{path}, line {line}", "it contains zero bytes, which text must not", "restore it from a copy"
    )
