"""The reference of settings and the recipe's schema are what the models say, and every key is described."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexperts.config.run import RunConfig
from flexperts.config.section import Section
from flexperts.config.silo import SiloConfig

from .scripts import script

AGAIN = "run `python dev/settings_page.py`"


MADE = script("dev/settings_page.py")
PAGE = MADE.PAGE.read_text(encoding="utf-8")


def test_the_page_and_the_schema_are_current() -> None:
    assert MADE.page() == PAGE, AGAIN
    assert MADE.recipe_schema() == MADE.SCHEMA.read_text(encoding="utf-8"), AGAIN


def models(of: type[Section]) -> Iterator[type[Section]]:
    """Yield a section and the sections of its keys, found by their classes."""
    yield of
    for field in of.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        yield from (m for kind in kinds if hasattr(kind, "model_fields") for m in models(kind))


@pytest.mark.parametrize("whole", [RunConfig, SiloConfig])
def test_every_key_has_a_description_and_a_line(whole: type[Section]) -> None:
    found = list(models(whole))
    assert len(found) > 1
    for section in found:
        assert section.__doc__, section
        assert section.__doc__ is not Section.__doc__, section
        for key, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                continue  # a section: its class is described
            where = f"{section.__name__}.{key}"
            assert field.description, f"{where} has no docstring"
            assert field.description.endswith((".", "...")), where
            assert "|" not in field.description, f"{where} would break its line of the table"
            words = " ".join(field.description.split())
            lines = [line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |")]
            assert any(words.split("docs/")[0] in line for line in lines), f"{where}: {AGAIN}"


@pytest.mark.parametrize(
    "line",
    [
        "### `[data.clients.NAME]`",
        "| `lr` | number > 0 | `0.002` | Peak learning rate of the shared parameters. |",
        "| `mmlu_shots` | integer ≥ 0, ≤ 5 | `0` | Solved questions shown before each question. |",
        '| `optimizer` | `"adamw"`, `"sgd"` | `"adamw"` | Optimizer of the local step; sgd has no momentum. |',
        "| `partition` | section | unset | One pooled data set, divided over clients. |",
        "### `[data]` of a silo file",
    ],
)
def test_a_line_says_type_limits_and_default(line: str) -> None:
    assert line in PAGE.splitlines()
