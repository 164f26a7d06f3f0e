"""YAML recipes as the same tree that TOML gives: by the core schema of YAML 1.2, without what TOML does not have.

PyYAML's own rules are those of YAML 1.1, where ``no`` is false, ``1e-3`` is text and ``12:30`` is a number. Here
only ``true`` and ``false`` are truth values, dates are text, and a number is what TOML calls one. Keys are text and
occur once, every key has a value, and anchors, aliases and ``<<`` work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from flexperts.errors import ConfigError

ENDINGS = (".yaml", ".yml")
_PREFIX = "tag:yaml.org,2002:"
_MOST_VALUES = 100_000
"""Aliases can stand for more values than fit the memory."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as PyYAML declares it


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_PREFIX}{_kind}", re.compile(rf"(?:{_pattern})\Z"), [*_first, ""])


def yaml_tree(text: str, where: str) -> dict[str, Any]:
    """Return a YAML document as nested dictionaries, lists, texts, numbers and truth values.

    Args:
        text: The document.
        where: Its file, for messages.

    Raises:
        ConfigError: It is not YAML, or has something that a recipe cannot have.
    """
    try:
        document = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise ConfigError(place, f"it is not valid YAML ({problem or error})", "fix the syntax there") from error
    if document is None:
        return {}
    if not isinstance(document, yaml.MappingNode):
        raise ConfigError(where, "a recipe is a mapping of sections", "begin with a key, such as data:")
    tree: dict[str, Any] = _Reader(where).value(document)
    return tree


class _Reader:
    """Reader of one document's nodes.

    Args:
        where: The file, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where, self._values = where, 0

    def value(self, node: yaml.Node) -> Any:
        """Return a node's value."""
        self._values += 1
        if self._values > _MOST_VALUES:
            raise self._wrong(node, "its aliases stand for too many values", "write fewer aliases of aliases")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == f"{_PREFIX}merge":
                merged.append(value)
                continue
            name = self._key(key)
            if name in found:
                raise self._wrong(key, f"the key {name!r} occurs twice", "remove one of the two")
            found[name] = self.value(value)
        for other in self._mappings(merged):
            found = self._mapping(other) | found
        return found

    def _mappings(self, nodes: list[yaml.Node]) -> Iterator[yaml.MappingNode]:
        """Yield the mappings that are merged; earlier ones count more, as the keys that are there do."""
        for node in nodes:
            if isinstance(node, yaml.MappingNode):
                yield node
            elif isinstance(node, yaml.SequenceNode):
                yield from self._mappings(node.value)
            else:
                raise self._wrong(node, "<< takes a mapping or several", "write << with an alias of a mapping")

    def _key(self, node: yaml.Node) -> str:
        if not (isinstance(node, yaml.ScalarNode) and node.tag == f"{_PREFIX}str"):
            raise self._wrong(node, "a key must be text", "put it in quotes")
        return str(node.value)

    def _scalar(self, node: yaml.Node) -> Any:
        text, kind = str(node.value), node.tag.removeprefix(_PREFIX)
        if kind == "null":
            raise self._wrong(node, "a key or item has no value", 'remove it, or write "" for empty text')
        try:
            if kind in ("int", "float"):
                return int(text) if kind == "int" else float(text)
        except ValueError as error:  # a tag that the text does not fit
            raise self._wrong(node, f"it is no {kind}", "remove the tag") from error
        if kind == "bool":
            return text.lower() == "true"
        if kind != "str":
            raise self._wrong(node, f"the tag {node.tag} has no meaning in a recipe", "remove the tag")
        return text

    def _wrong(self, node: yaml.Node, rule: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._where}, line {node.start_mark.line + 1}", rule, remedy)
