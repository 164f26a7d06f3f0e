"""The laws of the layout, checked from the source alone: see ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "flexperts"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = [
    {"errors", "environment", "seeding", "observer"},
    {"config", "files", "progress"},
    {"recipe", "artifacts", "checked_file", "tracking", "data", "smol_moe", "moe"},
    {"parameters"},
    {"modeling", "parts"},
    {"training", "selection", "evaluation", "communication"},
    {"methods"},
    {"protection"},
    {"client", "server"},
    {"finished", "status"},
    {"engines", "deployment", "serving", "costs"},
    {"audit", "export", "studies"},
    {"reports"},
    {"terminal"},
    {"cli", "library"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OUTSIDE = {"__init__", "__main__", "testing"}  # names things lazily, is the command, is for tests
FLOWER = {"communication", "methods", "protection", "client", "server", "engines", "deployment"}
UNKNOWN_TO_THE_SERVER = {
    "data",
    "modeling",
    "moe",
    "smol_moe",
    "parts",
    "selection",
    "training",
    "client",
    "engines",
}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_part_has_a_level() -> None:
    assert len(FILES) > 40
    assert {part(p) for p in FILES} - OUTSIDE == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_from_levels_above_its_own_or_from_its_own_part(path: Path) -> None:
    """What lies outside the levels is imported by none of them."""
    ours = part(path)
    for name in imports(path):
        if not name.startswith("flexperts.") or ours in OUTSIDE:
            continue
        theirs = name.split(".")[1]
        assert theirs == ours or LEVEL[theirs] < LEVEL[ours], f"{ours} imports {name}"


def test_the_server_can_name_no_rows_no_base_and_no_training() -> None:
    named = {
        n.split(".")[1] for p in (SOURCE / "server").rglob("*.py") for n in imports(p) if n.startswith("flexperts.")
    }
    assert "communication" in named
    assert not named & UNKNOWN_TO_THE_SERVER


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_short_and_imports_flower_only_where_it_may(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    if part(path) not in FLOWER:
        assert not [n for n in imports(path) if n.split(".")[0] == "flwr"]


def test_private_names_of_flower_stand_in_one_file() -> None:
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    users = {p.name for p in FILES if any(n.split(".")[0] == "flwr" and n not in public for n in imports(p))}
    assert users == {"flower_private.py"}


def test_package_inits_hold_a_docstring_and_nothing_else() -> None:
    inits = [p for p in FILES if p.name == "__init__.py" and p.parent != SOURCE]
    assert inits
    assert all(len(ast.parse(p.read_text(encoding="utf-8")).body) == 1 for p in inits)


def test_no_part_is_called_utils_or_common() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc")]


def test_public_names_are_this_list() -> None:
    import flexperts

    assert flexperts.__all__ == sorted(flexperts.__all__)
    assert all(getattr(flexperts, name) is not None for name in flexperts.__all__)
    assert len(flexperts.__all__) <= 28


def test_importing_the_package_and_its_command_line_loads_nothing_heavy() -> None:
    code = "import sys, flexperts, flexperts.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "peft", "flwr", "datasets", "pydantic", "numpy"} & set(loaded)


def test_levels_are_those_of_the_architecture_page() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(0 .*?)```", page, re.DOTALL)
    assert block
    lines = [re.match(r"(\d+) +([a-z_ ]+?)  ", line) for line in block[1].splitlines()]
    assert [(int(m[1]), set(m[2].split())) for m in lines if m] == list(enumerate(LAYERS))


def test_the_architecture_page_names_real_folders() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"^## The repository\n```text\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert block
    named = re.findall(r"^([a-z_/]+/) ", block[1], re.MULTILINE)
    assert len(named) >= 6
    assert all((ROOT / name).is_dir() for name in named)
