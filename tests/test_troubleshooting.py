"""docs/troubleshooting.md quotes messages that flexperts has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OTHERS = {"Input should be", "Killed"}  # pydantic's, and the system's
FIRST_CELLS = re.findall(
    r"^\| (?!the message|you see)([^|]*`[^|]*) \|", PAGE.split("## Scores look wrong")[0], re.MULTILINE
)
QUOTED = [quote for cell in FIRST_CELLS for quote in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def source() -> str:
    files = sorted((ROOT / "src" / "flexperts").rglob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)  # a message may go over two lines


@pytest.mark.parametrize("quote", QUOTED)
def test_a_quoted_message_is_one_of_ours(quote: str, source: str) -> None:
    assert quote in source or quote in OTHERS


def test_there_are_messages_to_check() -> None:
    assert len(QUOTED) > 50
