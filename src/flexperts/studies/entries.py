"""The runs of a comparison: entries (a method, or a variant of the recipe) and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexperts.config.changes import overrides_to
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError, did_you_mean
from flexperts.methods.registry import method_names
from flexperts.protection.pipeline import checked_method
from flexperts.recipe import load_recipe


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        name: A method's name, or a variant's.
        settings: KEY=VALUE overrides of the recipe.
    """

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison before it is run.

    Args:
        recipe: The recipe's file.
        settings: KEY=VALUE overrides of the recipe, for every run.
        entries: The entries, in the order of the table.
        seeds: The seeds; every entry runs with each.
        reference: Name of the entry with which the others are compared; None means the directory's reference, else
            the recipe's, else the first entry.
    """

    recipe: Path
    settings: tuple[str, ...]
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    reference: str | None

    @property
    def base(self) -> RunConfig:
        """The recipe without any entry's settings; as in every run, the newcomers are left out."""
        return _without_newcomers(load_recipe(self.recipe, self.settings))

    def as_begun(self, begun: RunConfig) -> ComparisonPlan:
        """Return the comparison with what its recipe leaves open as it was when it began.

        What an entry sets goes on top, so an entry's "auto" stays "auto".

        Args:
            begun: The recipe with which the comparison began.
        """
        now = load_recipe(self.recipe, self.settings)
        return replace(self, settings=(*self.settings, *overrides_to(now.to_toml(), now.as_begun(begun).to_toml())))

    def config(self, entry: Entry, seed: int) -> RunConfig:
        """Return the whole configuration of one run."""
        config = _without_newcomers(load_recipe(self.recipe, (*self.settings, *entry.settings, f"seed={seed}")))
        return config.model_copy(update={"method": config.method.model_copy(update={"reference": None})})

    def check(self) -> None:
        """Refuse settings that are invalid for any entry, before the first run."""
        for entry in self.entries:
            checked_method(self.config(entry, self.seeds[0]))


def plan_comparison(
    recipe: Path,
    settings: Sequence[str] = (),
    *,
    entries: Sequence[str] = (),
    seeds: int | None = None,
    reference: str | None = None,
) -> ComparisonPlan:
    """Return the comparison of a recipe's ``[compare]`` section; the arguments override it.

    Args:
        recipe: The recipe's file.
        settings: KEY=VALUE overrides of the recipe.
        entries: Names of methods, and of variants in ``[compare.variants]``; "all" means all methods that are not
            named as well.
        seeds: Number of seeds; they are 0, 1, ...
        reference: The entry with which the others are compared.
    """
    config = load_recipe(recipe, settings)
    compare, method = config.compare, config.method
    names = _expanded(entries or compare.entries or [n for n in (method.name, method.reference) if n])
    if len(set(names)) != len(names):
        raise ConfigError(f"entries {', '.join(names)}", "names must be unique", "remove the repeated name")
    found = tuple(Entry(name, _settings(name, config)) for name in names)
    if compare.reference is not None:
        _settings(compare.reference, config)  # raises if the name is misspelt
    count = compare.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds = {count}", "a comparison needs at least one seed", "use 3 or more")
    plan = ComparisonPlan(recipe, tuple(settings), found, tuple(range(count)), reference)
    plan.check()
    return plan


def _without_newcomers(config: RunConfig) -> RunConfig:
    """Return a configuration whose data leaves out the newcomers."""
    if not config.compare.newcomers:
        return config
    left = dict.fromkeys((*(config.data.leave_out or ()), *config.compare.newcomers))
    return config.model_copy(update={"data": config.data.model_copy(update={"leave_out": tuple(left)})})


def _expanded(names: Sequence[str]) -> tuple[str, ...]:
    others = [name for name in method_names() if name not in names]
    return tuple(each for name in names for each in (others if name == "all" else [name]))


def _settings(name: str, config: RunConfig) -> tuple[str, ...]:
    """Return an entry's overrides; the recipe's method options are dropped if the method differs."""
    variants = config.compare.variants
    if name in method_names():
        return (f"method.name={name}", *_no_options(name, config), *variants.get(name, ()))
    if name in variants:
        keys = {key.strip(): value.strip(" \"'") for key, _, value in (s.partition("=") for s in variants[name])}
        return (*_no_options(keys.get("method.name", config.method.name), config), *variants[name])
    known = [*method_names(), *variants]
    remedy = did_you_mean(name, known, "name a method, or define it under [compare.variants]")
    raise ConfigError(f"entry {name!r}", "it is neither a method nor a variant of the recipe", remedy)


def _no_options(method: str, config: RunConfig) -> tuple[str, ...]:
    return () if method == config.method.name else ("method.options={}",)
