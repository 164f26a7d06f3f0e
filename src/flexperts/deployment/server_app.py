"""Flower's ServerApp of a deployed run: it writes into one folder of the SuperLink's machine and loads no model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexperts.artifacts import RunDirectory
from flexperts.config.names import client_name
from flexperts.deployment.bounded_grid import BoundedGrid
from flexperts.deployment.region_door import serve_region
from flexperts.deployment.settings import METRICS, run_folder
from flexperts.errors import ArtifactError, FlexpertsError, optional
from flexperts.files import sole_writer
from flexperts.observer import Observer, Observers, current_observer, observing
from flexperts.recipe import parse_recorded, recorded_recipe
from flexperts.server.extending import extend, is_extended
from flexperts.server.serve import serve

_PATIENCE = 180.0
"""Seconds to wait for an earlier process of the same run to end."""

log = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run in the configuration: ``recipe`` (its text), ``out`` and ``region`` (names), ``resume``."""
    _quiet_but_for_us()
    try:
        config = parse_recorded(str(context.run_config["recipe"]))
        out = run_folder(str(context.run_config["out"]))
        resume, region = bool(context.run_config["resume"]), str(context.run_config["region"])
        # An earlier process of the same run can take a minute to notice that it has lost its SuperLink.
        patience = _PATIENCE if resume else 0.0
        with (
            _measured(RunDirectory(out)) as metrics,
            sole_writer(out, patience=patience, waiting=log.info),
            observing(Observers(LogObserver(), metrics)),
        ):
            if resume and (out / "config.toml").exists():
                config = config.as_begun(recorded_recipe(out))
                if is_extended(RunDirectory(out), config):
                    extend(RunDirectory(out), config, current_observer())
            run = _open(out, config.to_toml(), resume=resume)
            bounded = BoundedGrid(grid, config.federation.max_message_bytes)
            if region:  # a finished one still answers the request that its root may have lost
                serve_region(bounded, config, run, client_name(region), current_observer())
            elif not run.has_finished:
                serve(bounded, config, run, current_observer())
        log.info("finished; everything is in %s", out)
    except FlexpertsError as error:
        log.error("error: %s", error)
        raise


def _quiet_but_for_us() -> None:
    """Reduce Flower's log to warnings, and log the run's own lines."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


@contextmanager
def _measured(run: RunDirectory) -> Iterator[Observer]:
    """Yield an observer that writes the run's metrics, if the SuperLink has a folder for them."""
    folder = os.environ.get(METRICS)
    if not folder:
        yield Observer()
        return
    with optional("metrics", METRICS):
        from flexperts.deployment.run_metrics import RunMetrics
    metrics = RunMetrics(Path(folder), run)
    try:
        yield metrics
    finally:
        metrics.write()


def _open(out: Path, recipe: str, *, resume: bool) -> RunDirectory:
    if not resume:
        return RunDirectory.create(out, recipe)
    if not (out / "config.toml").exists():
        raise ArtifactError(f"{out}", "there is no run to resume", "check --out, or leave --resume out")
    run = RunDirectory.create_or_resume(out, recipe)
    run.note_environment()
    return run


class LogObserver(Observer):
    """Observer that writes a run's events as log lines, which `flwr log` shows."""

    def stage(self, text: str) -> None:
        """Log the stage that begins."""
        log.info("%s", text)

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        """Log the phase that begins."""
        log.info("%s: %d clients are asked", name, clients)

    def notice(self, text: str) -> None:
        """Log a notice."""
        log.warning("note: %s", text)

    def refused(self, client: str, reason: str) -> None:
        """Log a refused client and the reason."""
        log.warning("%s is refused: %s", client, reason)

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Log the table of what trains, what is sent and what stays."""
        for row in (row for row in table if row["tensors"]):
            log.info(
                "%s: %s: %d parameters, trained: %s, leaves: %s",
                *(method, row["group"], row["parameters"], row["trained"], row["leaves"]),
            )

    def round(self, record: Mapping[str, Any]) -> None:
        """Log the clients that trained, and the seconds of training."""
        # With local noise, clients do not report their losses.
        losses = {
            n: round(told["loss"], 3) if "loss" in told else "trained" for n, told in record["clients"].items()
        }
        log.info("round %d: %s, training %.1f s", record["number"], losses, record["seconds"]["training"])
