"""Flower's ServerApp: reads the recipe from the run's configuration and serves it over the grid it is given."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexperts.artifacts import RunDirectory
from flexperts.federation.observer import current_observer
from flexperts.federation.server import serve
from flexperts.recipe import parse_recipe

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run named by the configuration's ``recipe`` (its text) and ``out`` (the run directory)."""
    config = parse_recipe(str(context.run_config["recipe"]))
    run = RunDirectory.create_or_resume(Path(str(context.run_config["out"])), config.to_toml())
    serve(grid, config, run, current_observer())
