"""A comparison's directory belongs to one recipe, its entries and its reference; other uses are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from flexperts.config.changes import recipe_changes
from flexperts.config.names import normal
from flexperts.errors import ArtifactError, ConfigError, shown
from flexperts.files import unwritable
from flexperts.recipe import parse_recorded
from flexperts.studies.entries import ComparisonPlan
from flexperts.studies.finished import CLAIM, RUNS, finished_marks, folder_name, read_claim


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock a comparison's directory inside the block; other processes that share it wait."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f"{CLAIM}.lock")
        lock.acquire()
    except OSError as error:
        raise unwritable(out, error) from error
    try:
        yield
    finally:
        lock.release()


def continued(plan: ComparisonPlan, out: Path) -> ComparisonPlan:
    """Return the comparison with what it leaves open as it was when the directory's began, if there is one."""
    if not (out / CLAIM).exists():
        return plan
    return plan.as_begun(parse_recorded(read_claim(out)["recipe"], where=str(out / CLAIM)))


def claimed(plan: ComparisonPlan, out: Path) -> dict[str, Any]:
    """Return the description of a comparison's directory, with the entries that it already has.

    Args:
        plan: The comparison to run.
        out: The directory; it need not exist.
    """
    path, compare = out / CLAIM, plan.base.compare
    claim: dict[str, Any] = {"recipe": plan.base.to_toml(), "newcomers": [*map(normal, compare.newcomers)]}
    before = read_claim(out) if path.exists() else claim
    _check_same_recipe(before, claim, out)
    entries = _entries(plan, before.get("entries", {}), out)
    planned = [entry.name for entry in plan.entries]
    there = [name for name in entries if name in planned or finished_marks(out, name)]
    if plan.reference and plan.reference not in there:
        raise ConfigError(
            f"reference {plan.reference!r}", f"it must be one of {', '.join(there)}", "add it to the entries"
        )
    # The directory's stays, also while another process has not finished its first run.
    known = [name for name in (before.get("reference"), compare.reference) if name in entries]
    reference = plan.reference or [*known, *planned][0]
    bootstrap = {"confidence": compare.confidence, "resamples": compare.resamples}
    return claim | {"entries": entries, "reference": reference, **bootstrap}


def _check_same_recipe(before: dict[str, Any], claim: dict[str, Any], out: Path) -> None:
    old, new = before.get("newcomers", []), claim["newcomers"]
    if before["recipe"] == claim["recipe"] and old == new:
        return
    joins = f"compare.newcomers: {shown(old)}, now {shown(new)}"
    changes = recipe_changes(before["recipe"], claim["recipe"]) if old == new else joins
    rule = f"it contains a comparison of another recipe ({changes})"
    raise ArtifactError(f"{out}", rule, "use the recipe and --set of the first start, or another --out")


def _entries(plan: ComparisonPlan, before: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return all entries of the directory; refuse an entry that would use another entry's finished runs."""
    new = {entry.name: list(entry.settings) for entry in plan.entries}
    entries = before | new
    places: dict[str, str] = {}
    for name in entries:
        started = any((out / RUNS / folder_name(name)).glob("*/config.toml"))
        if started and before.get(name, entries[name]) != entries[name]:
            changed = f"{out}: entry {name!r} with {entries[name]}"
            raise ArtifactError(changed, f"it was run with {before[name]}", "give the variant another name")
        if (other := places.setdefault(folder_name(name), name)) != name:
            raise ArtifactError(
                f"entries {other!r} and {name!r}", "their folders would have the same name", "rename one of them"
            )
    return entries
