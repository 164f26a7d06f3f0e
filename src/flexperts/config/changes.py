"""Settings by dotted key, and what differs between two recipes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from flexperts.errors import shown

_MOST_TOLD = 4
_ROUNDS = "federation.rounds"


def rounds_before(before: str, now: str) -> int | None:
    """Return how many rounds a recipe had, if the other recipe differs only in that; else None.

    Args:
        before: A recipe's TOML, as it is on disk.
        now: Another's.
    """
    try:
        old, new = (flat(tomllib.loads(text)) for text in (before, now))
    except ValueError:
        return None
    rounds = old.get(_ROUNDS)
    differ = {key for key in old | new if old.get(key) != new.get(key)}
    return rounds if differ == {_ROUNDS} and isinstance(rounds, int) else None


def way_on(kept: str, recipe: str, again: str, *, finished: bool) -> tuple[str, str]:
    """Return rule and remedy for a new run in a directory that already holds one.

    Args:
        kept: The recipe of the run in the directory; empty if it is not known.
        recipe: The recipe of the new run.
        again: The option or command that resumes the run in the directory.
        finished: Whether that run has finished.
    """
    rule, other = "it already holds a run", "choose another --out"
    if rounds_before(kept, recipe):
        return f"{rule}, of this recipe except federation.rounds", f"give it these rounds: {again}; or {other}"
    if not kept or kept != recipe:
        return rule, f"{other}, or delete it"
    if finished:
        more = f"{again} --set federation.rounds=N"
        return f"{rule}, of this recipe, that has finished", f"{other}, or give it more rounds: {more}"
    return f"{rule}, of this recipe, that has not finished", f"resume it: {again}"


def recipe_changes(before: str, now: str) -> str:
    """Return the keys in which two recipes differ, with both values, for a message.

    Args:
        before: A recipe's TOML, as it is on disk.
        now: Another's.
    """
    try:
        old, new = (flat(tomllib.loads(text)) for text in (before, now))
    except ValueError as error:
        return f"it cannot be read: {error}"
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    told = [f"{key}: {_at(old, key)}, now {_at(new, key)}" for key in keys[:_MOST_TOLD]]
    more = [f"and {len(keys) - _MOST_TOLD} more"] if keys[_MOST_TOLD:] else []
    return "; ".join([*told, *more]) or "only in its formatting"


def overrides_to(before: str, now: str) -> tuple[str, ...]:
    """Return KEY=VALUE overrides that change one recipe's settings to another's, where the other sets them.

    Args:
        before: A recipe's TOML.
        now: Another's.
    """
    old, new = (flat(tomllib.loads(text)) for text in (before, now))
    return tuple(f"{key}={json.dumps(value)}" for key, value in new.items() if old.get(key) != value)


def _at(settings: Mapping[str, Any], key: str) -> str:
    return shown(settings[key]) if key in settings else "unset"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree's values by dotted key, such as ``training.lr``; empty branches are left out."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
