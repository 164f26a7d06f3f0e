"""What a comparison runs: entries (a method, or a variant of the recipe) and their seeds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.registry import make_method, method_names
from flexperts.protection.pipeline import check_protections
from flexperts.recipe import load_recipe


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        name: A method's name, or a variant's.
        settings: KEY=VALUE on top of the recipe.
    """

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A comparison before it is run.

    Args:
        recipe: The recipe's file.
        settings: KEY=VALUE on top of it, for every run.
        entries: What is compared, in the order of the table.
        seeds: Seeds that every entry runs with.
        reference: Name of the entry that the others are compared with; None = the one that the directory has, else
            the recipe's, else the first.
    """

    recipe: Path
    settings: tuple[str, ...]
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    reference: str | None

    @property
    def base(self) -> RunConfig:
        """The recipe without any entry's settings."""
        return load_recipe(self.recipe, self.settings)

    def config(self, entry: Entry, seed: int) -> RunConfig:
        """Return one run, whole."""
        config = load_recipe(self.recipe, (*self.settings, *entry.settings, f"seed={seed}"))
        return config.model_copy(update={"method": config.method.model_copy(update={"reference": None})})

    def check(self) -> None:
        """Refuse settings that are wrong for any entry, before the first one runs."""
        for entry in self.entries:
            config = self.config(entry, self.seeds[0])
            method = make_method(config.method)
            method.check(config)
            check_protections(method, config)


def plan_comparison(
    recipe: Path,
    settings: Sequence[str] = (),
    *,
    entries: Sequence[str] = (),
    seeds: int | None = None,
    reference: str | None = None,
) -> Plan:
    """Return what a recipe's ``[compare]`` section asks for; arguments go before it.

    Args:
        recipe: The recipe's file.
        settings: KEY=VALUE on top of it.
        entries: Names of methods, and of variants that ``[compare.variants]`` defines; "all" stands for all
            methods that are not named beside it.
        seeds: How many; they are 0, 1, ...
        reference: The entry that others are compared with.
    """
    config = load_recipe(recipe, settings)
    compare, method = config.compare, config.method
    names = _expanded(entries or compare.entries or [n for n in (method.name, method.reference) if n])
    if len(set(names)) != len(names):
        raise ConfigError(f"entries {', '.join(names)}", "every name stands once", "drop the repetition")
    found = tuple(Entry(name, _settings(name, config)) for name in names)
    if compare.reference is not None:
        _settings(compare.reference, config)  # a misspelt name must not be passed over
    count = compare.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds = {count}", "a comparison needs at least one", "take 3 or more")
    plan = Plan(recipe, tuple(settings), found, tuple(range(count)), reference)
    plan.check()
    return plan


def _expanded(names: Sequence[str]) -> tuple[str, ...]:
    others = [name for name in method_names() if name not in names]
    return tuple(each for name in names for each in (others if name == "all" else [name]))


def _settings(name: str, config: RunConfig) -> tuple[str, ...]:
    """Return an entry's settings on top of the recipe; options belong to the method that they were given for."""
    variants = config.compare.variants
    if name in method_names():
        return (f"method.name={name}", *_no_options(name, config), *variants.get(name, ()))
    if name in variants:
        keys = {key.strip(): value.strip(" \"'") for key, _, value in (s.partition("=") for s in variants[name])}
        return (*_no_options(keys.get("method.name", config.method.name), config), *variants[name])
    known = [*method_names(), *variants]
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "name a method, or define it under [compare.variants]"
    raise ConfigError(f"entry {name!r}", "it is neither a method nor a variant of the recipe", remedy)


def _no_options(method: str, config: RunConfig) -> tuple[str, ...]:
    return () if method == config.method.name else ("method.options={}",)
