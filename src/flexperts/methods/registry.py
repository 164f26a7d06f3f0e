"""Method names and where their classes live. A new method is one file and one line here."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from flexperts.errors import ConfigError

if TYPE_CHECKING:
    from flexperts.methods.base import Method

_METHODS: dict[str, str] = {
    "fedavg": "flexperts.methods.fedavg:FedAvg",
    "flex": "flexperts.methods.flex:Flex",
    "local": "flexperts.methods.local:Local",
}


def register_method(name: str, target: str | type[Method]) -> None:
    """Add a method under a new name.

    Args:
        name: What recipes will call it.
        target: The class, or ``"package.module:Class"`` to import it when it is first used.

    Raises:
        ConfigError: The name is taken by another class.
    """
    path = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if _METHODS.get(name, path) != path:
        raise ConfigError(f"method {name!r}", f"the name belongs to {_METHODS[name]}", "choose another name")
    _METHODS[name] = path
    if not isinstance(target, str):
        _LOADED[name] = target


_LOADED: dict[str, type[Method]] = {}


def method_names() -> list[str]:
    """Return all registered names, sorted."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``, imported on first use.

    Raises:
        ConfigError: No such method; the error says which names are close.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see `flexperts methods`"
        raise ConfigError(f"method {name!r}", f"methods are {', '.join(method_names())}", hint)
    if name not in _LOADED:
        module, _, attribute = _METHODS[name].partition(":")
        _LOADED[name] = getattr(import_module(module), attribute)
    return _LOADED[name]
