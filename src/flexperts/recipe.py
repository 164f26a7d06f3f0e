"""Reading recipes: TOML, overrides on top, and errors that name the key and what was meant."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from flexperts.config.data import DataConfig
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe file; data paths in it are relative to its folder.

    Args:
        path: The TOML file.
        overrides: Settings such as ``"training.lr=1e-3"``, applied on top.

    Raises:
        ConfigError: The file is missing, no TOML, or breaks a rule.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}", "there is no such recipe", "see the recipes folder") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}", f"it is not UTF-8 text ({error})", "save it as UTF-8") from error
    return parse_recipe(text, overrides, folder=path.parent, where=str(path))


def parse_recipe(
    text: str, overrides: Iterable[str] = (), *, folder: Path | None = None, where: str = "recipe"
) -> RunConfig:
    """Parse a recipe's text; see ``load_recipe``."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(where, f"it is not valid TOML ({error})", "mend it") from error
    for override in overrides:
        _override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where) from error
    return config if folder is None else _absolute(config, folder)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}", "an override is key=value", "write it like training.lr=1e-3")
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}", f"{section} is a value, not a section", "check the key")
    tree[last] = _value(text.strip())


def _value(text: str) -> Any:
    """Read a TOML value; what is none stands for itself, so that names need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, where: str) -> ConfigError:
    """Turn pydantic's report into one line with every offence, and a did-you-mean for unknown keys."""
    offences = [_offence(e) for e in error.errors()]
    return ConfigError(where, "; ".join(offences), "mend the keys named")


def _offence(detail: Mapping[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _keys_at(path[:-1]), n=1, cutoff=0.5)
        known = f"did you mean {'.'.join([*path[:-1], close[0]])!r}?" if close else f"known: {_keys_at(path[:-1])}"
        return f"unknown key {key!r} ({known})"
    shown = "" if detail["type"] in ("missing", "value_error") else f" = {detail['input']!r}"
    return f"{key or 'recipe'}{shown}: {detail['msg'].removeprefix('Value error, ')}"


def _keys_at(path: list[str]) -> list[str]:
    schema: Any = RunConfig
    for part in path:
        if get_origin(schema) is dict:  # any name may stand here, such as a client's
            schema = get_args(schema)[1]
            continue
        field = schema.model_fields.get(part) if hasattr(schema, "model_fields") else None
        schema = field.annotation if field else None
        if get_origin(schema) is not dict:
            schema = next((a for a in get_args(schema) if hasattr(a, "model_fields")), schema)
    return sorted(getattr(schema, "model_fields", {}))


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Resolve data paths against the recipe's folder."""

    def resolve(source: str | None) -> str | None:
        return source if source is None or source.startswith("hub:") else str((folder / source).resolve())

    data = config.data.model_dump(exclude_none=True)
    if config.data.folder:
        data["folder"] = resolve(config.data.folder)
    data["clients"] = {
        n: {"train": resolve(f.train), "test": resolve(f.test)} for n, f in config.data.clients.items()
    }
    if pool := config.data.partition:
        data["partition"] |= {"source": resolve(pool.source), "test": resolve(pool.test)}
    knowledge = config.knowledge
    if knowledge.mmlu != "hub":
        knowledge = knowledge.model_copy(update={"mmlu": resolve(knowledge.mmlu)})
    knowledge = knowledge.model_copy(update={"general": resolve(knowledge.general)})
    return config.model_copy(update={"data": DataConfig.model_validate(data), "knowledge": knowledge})
