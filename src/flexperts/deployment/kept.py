"""What a silo keeps of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexperts.artifacts import RunDirectory
from flexperts.config.changes import recipe_changes, rounds_before
from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, partition_manifest
from flexperts.data.unchanged import check_same_rows
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.state import private_folder, run_ids
from flexperts.errors import ArtifactError
from flexperts.files import mapping, read_json, write_json, write_text
from flexperts.parameters.store import load_personal
from flexperts.recipe import recorded_recipe

_CHOICES = "choices.json"


@dataclass(frozen=True)
class KeptRun:
    """One run's private state.

    Args:
        run: The run's id.
        method: Its method.
        round: Last round in which the silo trained.
        bytes: Size of all its files; 0 if only the ledger knows the run.
        epsilon: What its updates have spent; infinite without local noise, None if the ledger does not know it.
    """

    run: str
    method: str
    round: int
    bytes: int
    epsilon: float | None


def keep_recipe(folder: Path, recipe: str) -> None:
    """Write a run's recipe, as received from the server, to the run's folder, or check that it is the same.

    The number of rounds may differ: the server can change it during a run.
    """
    kept = RunDirectory.open(folder).config_toml if (folder / "config.toml").exists() else None
    if kept is None or rounds_before(kept, recipe):
        write_text(folder / "config.toml", recipe)
    elif kept != recipe:
        rule = f"it holds a run with another recipe ({recipe_changes(kept, recipe)})"
        raise ArtifactError(f"{folder}", rule, "start a new run on the server")


def with_kept_choices(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run with this silo's earlier choices for settings that the recipe leaves open."""
    if not (note := folder / _CHOICES).exists():
        return config
    noted = mapping(note, read_json(note))
    return config.with_choices(noted.get("template_date"), noted.get("max_new_tokens"))


def keep_choices(folder: Path, template_date: str | None, max_new_tokens: int) -> None:
    """Write this silo's choices for a run: the templates' date by its clock, the answer limit by its rows."""
    write_json(folder / _CHOICES, {"template_date": template_date, "max_new_tokens": max_new_tokens})


def keep_rows(folder: Path, clients: Clients) -> bool:
    """Write counts and hashes of the rows with which a run starts at this silo, or check that they are the same.

    Returns:
        Whether the run began with an earlier version, which wrote no such file: its first rows are not known.
    """
    note = RunDirectory(folder).partition
    if note.exists():
        check_same_rows(note, clients)
        return False
    write_json(note, partition_manifest(clients))
    return (folder / "config.toml").exists()


def kept_runs(state: Path, client: str, ledger: Ledger) -> Iterator[KeptRun]:
    """Yield the runs of a state folder and of its ledger, sorted by id.

    Args:
        state: The state folder.
        client: The silo's name.
        ledger: The folder's ledger.
    """
    kept = run_ids(state)
    for run in sorted({*kept, *ledger.runs}):
        spent = ledger.runs.get(run)
        epsilon = None if spent is None else ledger.epsilon(spent)
        if spent is not None and run not in kept:
            yield KeptRun(run, spent.method, spent.round, 0, epsilon)
            continue
        folder = private_folder(state, run)
        recipe = recorded_recipe(RunDirectory.open(folder).path)
        personal = folder / "personal" / f"{client}.safetensors"
        last = load_personal(personal)[1].round if personal.exists() else 0
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield KeptRun(run, recipe.method.name, last, size, epsilon)
