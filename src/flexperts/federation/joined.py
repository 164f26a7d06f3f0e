"""The rows of a client that joined after training: where they lie, as its record in the run directory says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flexperts.config.data import ClientFiles, DataConfig, OnBadRow
from flexperts.config.run import RunConfig
from flexperts.data.sources import HUB
from flexperts.data.unchanged import check_unchanged
from flexperts.federation.workspace import Workspace
from flexperts.recipe import located


def with_rows_of(
    config: RunConfig, name: str, files: ClientFiles, columns: Mapping[str, str], on_bad_row: OnBadRow
) -> RunConfig:
    """Return a run with one client's own rows in place of all clients'; how they are held out stays the run's."""
    old = config.data
    kept = {"test_fraction": old.test_fraction, "validation_fraction": old.validation_fraction}
    data = DataConfig(clients={name: files}, columns=dict(columns), on_bad_row=on_bad_row, **kept)
    return config.model_copy(update={"data": data})


def workspace_of(run: Path, record: Mapping[str, Any], workspace: Workspace) -> Workspace:
    """Return the workspace of a client that has joined: its rows, on the base of the run's workspace.

    Rows are read when they are needed, and refused if they are no longer those that it joined with.
    """
    name, data = record["client"], record["data"]
    files = ClientFiles(train=_from(run, data["train"]), test=data["test"] and _from(run, data["test"]))
    config = with_rows_of(workspace.config, name, files, data["columns"], data.get("on_bad_row", "refuse"))
    same = partial(check_unchanged, {name: record["rows"]}, rule=f"{name} joined with other rows than these")
    return Workspace(config, workspace.base, workspace.untouched, same)


def kept_data(run: Path, files: ClientFiles, columns: Mapping[str, str], on_bad_row: OnBadRow) -> dict[str, Any]:
    """Return where rows lie as the record keeps it: relative to the run, so that it tells no more than it must."""
    return {
        "train": _seen_from(run, files.train),
        "test": files.test and _seen_from(run, files.test),
        "columns": dict(columns),
        **({"on_bad_row": on_bad_row} if on_bad_row != "refuse" else {}),
    }


def _seen_from(run: Path, source: str) -> str:
    return source if source.startswith(HUB) else Path(os.path.relpath(source, run.resolve())).as_posix()


def _from(run: Path, source: str) -> str:
    return located(source, run)
