"""The reference of all settings and the recipe's JSON schema, made from the models in `flexperts.config`.

    python dev/settings_page.py     # writes docs/settings.md and docs/recipe.schema.json

A test fails when the two files are not what this script would write.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "settings.md"
SCHEMA = DOCS / "recipe.schema.json"

HEAD = """# Settings

Made by `python dev/settings_page.py` from `config/`; a test keeps it current.

A run is one file, the recipe: TOML, or YAML (`.yaml`, `.yml`) with the same keys. Only `data` is required; every
other key has the default that is given here. Unknown keys and values outside the limits are refused. `--set`
overrides a key for one command, as in `flexperts run my-run.toml --set training.lr=1e-3`; an empty value
(`--set knowledge.general=`) unsets a key whose default is unset. Data paths are relative to the file that names
them. A run keeps its whole recipe, defaults included, as `config.toml` in its directory.

{sections}

**In an editor.** [recipe.schema.json](recipe.schema.json) is a JSON schema of the recipe. Editors that use
[taplo](https://taplo.tamasfe.dev), such as VS Code with Even Better TOML, complete keys, show these descriptions
and mark errors. For this, the recipe's first line names the schema, by URL or by path relative to the recipe:

```toml
#:schema ./recipe.schema.json
```

The schema knows types, choices and limits of single keys. Rules between keys are checked when a recipe is read.
"""

Schema = dict[str, Any]
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def recipe_schema() -> str:
    """Return docs/recipe.schema.json."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **RunConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def page() -> str:
    """Return docs/settings.md: a table for every section of the recipe and of a silo file."""
    recipe, silo = RunConfig.model_json_schema(), SiloConfig.model_json_schema()
    links = ", ".join(f"[`{key}`](#{key})" for key, found in recipe["properties"].items() if section_of(found))
    contents = f"Sections of the recipe: {links}. A [deployed](deploy.md) silo also has a [silo file](#silo-file)."
    parts = [HEAD.format(sections=textwrap.fill(contents, 116)), "## Recipe"]
    parts += [table(path, schema, "") for path, schema in sections(recipe, recipe["$defs"])]
    parts += ["## Silo file"]
    parts += [table(path, schema, " of a silo file") for path, schema in sections(silo, silo["$defs"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections(schema: Schema, known: dict[str, Schema], path: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield a section and all sections in it: the dotted path, which is empty at the top level, and the schema."""
    yield path, schema
    for key, found in schema["properties"].items():
        if inner := section_of(found):
            many = ".NAME" if found.get("type") == "object" else ""
            yield from sections(known[inner], known, f"{path}.{key}{many}".lstrip("."))


def section_of(found: Schema) -> str | None:
    """Return the schema's name of the section, or of the named sections, that a key holds; None for a value."""
    each = found.get("additionalProperties")
    ways = [*found.get("anyOf", []), each if isinstance(each, dict) else {}, found]
    return next((way["$ref"].rpartition("/")[2] for way in ways if "$ref" in way), None)


def table(path: str, schema: Schema, where: str) -> str:
    """Return a section: its heading, what it is, and one line for each of its keys."""
    heading = f"### `[{path}]`{where}" if path else f"### Top level{where}"
    rows = [
        f"| `{key}` | {kind(found)} | {default(found, key in schema.get('required', ()))} | {meaning(found)} |"
        for key, found in schema["properties"].items()
        if path or not section_of(found) or found.get("default", found) is None  # optional: its own line says so
    ]
    head = ["| key | type and limits | default | meaning |", "|---|---|---|---|"]
    return "\n".join([heading, meaning(schema), "", *head, *rows])


def kind(found: Schema) -> str:
    """Return what a key may hold: its type with its limits, or its choices."""
    if section_of(found):
        return "section"
    if "anyOf" in found:
        return ", or ".join(kind(way) for way in found["anyOf"] if way.get("type") != "null")
    if choices := found.get("enum", [found["const"]] if "const" in found else None):
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if found["type"] == "array":
        return f"list of {kind(found['items'])}"
    if found["type"] == "object":
        inner, keys = found["additionalProperties"], found.get("propertyNames", {}).get("enum", [])
        names = ", ".join(f"`{key}`" for key in keys) or "name"
        return "table" if inner is True else f"table: {names} -> {kind(inner)}"
    limits = [f"{sign} {found[name]}" for name, sign in LIMITS.items() if name in found]
    limits += ["not empty"] * ("minLength" in found)
    return " ".join([TYPES[found["type"]], ", ".join(limits)]).strip()


def default(found: Schema, required: bool) -> str:
    """Return a key's default as TOML."""
    if required:
        return "required"
    value = found.get("default", {})  # pydantic leaves out what a factory makes: here, empty tables
    return "unset" if value is None else f"`{json.dumps(value)}`"


def meaning(found: Schema) -> str:
    """Return a description in one line, with links to the pages that it names."""
    line = " ".join(found["description"].split())
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", line)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(recipe_schema(), encoding="utf-8")
