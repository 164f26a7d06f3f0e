"""Reading recipes and silo files, TOML or YAML: overrides, and errors that name the key and the nearest valid."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from flexperts.config import yaml_tree
from flexperts.config.data import GIVEN, ClientFiles, DataConfig
from flexperts.config.run import EngineConfig, RunConfig, as_recorded
from flexperts.config.section import Section
from flexperts.config.silo import SiloConfig
from flexperts.errors import ConfigError, closest, require, shown
from flexperts.files import damaged, text_of

_PACKAGE = Path(__file__).parent
_RECIPES = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
"""Folders of the recipes that ship: in a wheel, in a clone."""


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe file; data paths in it are relative to its folder.

    Args:
        path: The file, TOML or (.yaml, .yml) YAML; or the bare name of a recipe that ships, such as ``quickstart``.
        overrides: Settings such as ``"training.lr=1e-3"``, which replace the file's.

    Raises:
        ConfigError: The file is missing, is not valid TOML or YAML, or breaks a rule.
    """
    path, shipped = Path(path), shipped_recipes()
    if str(path) in shipped and not path.is_file():
        path = shipped[str(path)]
    there = f"give a TOML or YAML file, or the name of a recipe that ships: {', '.join(shipped)}"
    return parse_recipe(_text(path, "recipe", there), overrides, folder=path.parent, where=str(path))


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship, by name."""
    return {path.stem: path for folder in _RECIPES for path in sorted(folder.glob("*.toml"))}


def load_silo(path: Path | str) -> SiloConfig:
    """Read a silo's file; paths in it are relative to its folder."""
    path = Path(path)
    tree = _tree(_text(path, "silo file", "see the example in docs/deploy.md"), str(path))
    try:
        silo = SiloConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, str(path), SiloConfig) from error
    return _absolute_silo(silo, path.parent)


def holds_silo(path: Path) -> bool:
    """Return whether a file is a silo's, not a recipe: only silos have a name and a state."""
    if str(path) in shipped_recipes() and not path.is_file():
        return False
    there = "give a recipe, a silo's file, or a file of rows"
    return bool({"name", "state"} & _tree(_text(path, "recipe or silo file", there), str(path)).keys())


def client_files(where: str, settings: Mapping[str, Any]) -> ClientFiles:
    """Return a client's files and settings; see ``config.data.ClientFiles``.

    Args:
        where: What gives the settings, for messages.
        settings: The settings.
    """
    try:
        return ClientFiles.model_validate(settings)
    except ValidationError as error:
        raise _explain(error, where, ClientFiles) from error


def recorded_recipe(run: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read the recipe in a run directory.

    Args:
        run: The directory.
        overrides: Settings that replace the recipe's.
    """
    path = run / "config.toml"
    text = text_of(path)
    try:
        config = parse_recorded(text, where=str(path))
    except ConfigError as error:
        raise damaged(path, error.rule) from error
    return parse_recorded(text, overrides, where=str(path)) if overrides else config


def parse_recorded(text: str, overrides: Iterable[str] = (), *, where: str = "recipe") -> RunConfig:
    """Parse a recipe that ``RunConfig.to_toml`` wrote, in this version or an earlier one."""
    return _overridden(as_recorded(_tree(text, where)), overrides, where=where)


def check_trust(config: RunConfig, where: Path, *, trusted: bool) -> None:
    """Refuse a file that asks for a base's own code, unless the caller trusts that code as well.

    Args:
        config: The recipe in the file.
        where: The file.
        trusted: Whether the caller does, by ``--trust-remote-code`` or ``trust_remote_code=True``.
    """
    if config.model.trust_remote_code and not trusted:
        raise ConfigError(
            f"{where}: model.trust_remote_code = true",
            f"it asks to run code of the base {config.model.base!r}, and a file alone must not decide that",
            "add --trust-remote-code if you trust the author of the base",
        )


def check_extras(config: RunConfig) -> None:
    """Refuse settings that need an extra which is not installed, before anything is imported or read for them."""
    if config.data.partition is not None:
        require("flwr_datasets", "partition", "data.partition")
    if config.privacy.noise != "none":
        require("dp_accounting", "privacy", "privacy.noise")
    if config.knowledge.mmlu is not None:
        require("lm_eval", "knowledge", "knowledge.mmlu")
    if config.model.quantization != "none":
        require("bitsandbytes", "quantization", "model.quantization")
    if config.engine.kind == "ray":
        require("ray", "ray", "engine.kind")


def check_silo_extras(silo: SiloConfig) -> None:
    """Do what ``check_extras`` does, for a silo's file."""
    if silo.quantization != "none":
        require("bitsandbytes", "quantization", "quantization")
    if silo.policy.noise != "none":
        require("dp_accounting", "privacy", "policy.noise")
    if silo.metrics is not None:
        require("prometheus_client", "metrics", "metrics in a silo's file")


def parse_recipe(
    text: str, overrides: Iterable[str] = (), *, folder: Path | None = None, where: str = "recipe"
) -> RunConfig:
    """Parse a recipe's text; see ``load_recipe``."""
    return _overridden(_tree(text, where), overrides, folder=folder, where=where)


def _overridden(
    tree: dict[str, Any], overrides: Iterable[str], *, folder: Path | None = None, where: str
) -> RunConfig:
    for override in overrides:
        _override(tree, override)
    return recipe_of_tree(tree, folder=folder, where=where)


def recipe_of_tree(tree: Mapping[str, Any], *, folder: Path | None = None, where: str = "recipe") -> RunConfig:
    """Return a recipe from its sections and settings as nested mappings; see ``load_recipe``."""
    _check_values(tree, where)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, RunConfig) from error
    return config if folder is None else _absolute(config, folder)


def engine_settings(workers: str | None) -> EngineConfig:
    """Return the engine settings of a command without a recipe.

    Args:
        workers: The option's text; by default there are no worker processes.
    """
    try:
        return EngineConfig.model_validate({} if workers is None else {"workers": _value(workers)})
    except ValidationError as error:
        raise _explain(error, "--workers", EngineConfig) from error


def _text(path: Path, kind: str, there: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}", f"it is not UTF-8 text ({error})", "save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}", f"there is no such {kind}", there) from error


def _tree(text: str, where: str) -> dict[str, Any]:
    text = text.removeprefix("\ufeff")  # editors on Windows write a byte order mark
    is_yaml = Path(where).suffix.lower() in yaml_tree.ENDINGS
    try:
        tree = yaml_tree.yaml_tree(text, where) if is_yaml else tomllib.loads(text)
        _check_values(tree, where)
        return tree
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        form = "YAML" if is_yaml else "TOML"
        raise ConfigError(where, f"it is not valid {form} ({error})", "fix the syntax at that place") from error


def _check_values(value: Any, where: str) -> None:
    """Refuse whole numbers of more than 64 bits: TOML does not guarantee them, so they may not be writable."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_values(inner, where)
    if isinstance(value, int) and abs(value) >> 63:
        raise ConfigError(where, "a whole number must have at most 64 bits", "use a smaller number")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}", "an override must be KEY=VALUE", "write it like training.lr=1e-3")
    if not override.isascii() and override.encode(errors="replace").decode() != override:
        raise ConfigError(f"--set {override!r}", "an override must be UTF-8 text", "set the terminal to UTF-8")
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"--set {override}", f"{section} is a value, not a section", "use a key of the form SECTION.KEY"
            )
    tree[last] = _value(text.strip())
    _check_values(tree[last], f"--set {key}")


def _value(text: str) -> Any:
    """Return a TOML value; a text that is not one is returned as it is, so that names need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _explain(error: ValidationError, where: str, schema: type[Section]) -> ConfigError:
    """Return pydantic's errors as one line, with the closest valid key for each unknown one."""
    offences = [_offence(e, schema) for e in error.errors()]
    return ConfigError(where, "; ".join(offences), "change or remove these keys")


def _offence(detail: Mapping[str, Any], schema: type[Section]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _keys_at(path[:-1], schema)
        near = closest(path[-1], known, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near])!r}?" if near else f"known: {known}"
        return f"unknown key {key!r} ({hint})"
    value = "" if detail["type"] in ("missing", "value_error") else f" = {shown(detail['input'])}"
    return f"{key or 'recipe'}{value}: {detail['msg'].removeprefix('Value error, ')}"


def _keys_at(path: list[str], schema: Any) -> list[str]:
    for part in path:
        if get_origin(schema) is dict:  # any name is valid here, such as a client's
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
        return _resolved(source, folder)

    data = config.data.model_dump(exclude_none=True)
    if config.data.folder:
        data["folder"] = resolve(config.data.folder)
    data["clients"] = {
        n: f.own | {"train": resolve(f.train), "test": resolve(f.test)} for n, f in config.data.clients.items()
    }
    if pool := config.data.partition:
        data["partition"] |= {"source": resolve(pool.source), "test": resolve(pool.test)}
    knowledge = config.knowledge
    if knowledge.mmlu != "hub":
        knowledge = knowledge.model_copy(update={"mmlu": resolve(knowledge.mmlu)})
    knowledge = knowledge.model_copy(update={"general": resolve(knowledge.general)})
    return config.model_copy(update={"data": DataConfig.model_validate(data), "knowledge": knowledge})


def _absolute_silo(silo: SiloConfig, folder: Path) -> SiloConfig:
    """Resolve a silo's paths; a base that is not a local folder is a name."""
    files = {side: _resolved(getattr(silo.data, side), folder) for side in ("train", "test")}
    base = str((folder / silo.base).resolve()) if (folder / silo.base).is_dir() else silo.base
    own: dict[str, object] = {
        "state": _resolved(silo.state, folder),
        "base": base,
        "metrics": _resolved(silo.metrics, folder),
        "data": silo.data.model_copy(update=files),
    }
    if silo.socket is not None:
        own["socket"] = silo.socket.model_copy(update={"path": _resolved(silo.socket.path, folder)})
    return silo.model_copy(update=own)


def _resolved(source: str | None, folder: Path) -> str | None:
    return None if source is None else located(source, folder)


def located(source: str, folder: Path) -> str:
    """Return a data source as an absolute path; a source on the hub, or given from Python, is returned unchanged.

    A symbolic link keeps its name, because the name says what the file holds: the hub's cache links
    ``train.jsonl`` to a file named by a hash.
    """
    if source.startswith(("hub:", GIVEN)):
        return source
    try:
        path = folder / source
        real = path.resolve()
        found = str(real if path.name == ".." else path.parent.resolve() / path.name)
        found.encode()
        return found
    except UnicodeEncodeError as error:
        rule = "its bytes are not UTF-8 text, and a run records the paths of its rows as UTF-8"
        raise ConfigError(f"path {shown(found)}", rule, "rename that folder or file") from error
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a link to itself
        raise ConfigError(
            f"path {shown(source)}", f"it is not a valid path ({error})", "give a path to a file or folder"
        ) from error
