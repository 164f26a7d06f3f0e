"""Changing a run's number of rounds: more rounds after it has finished, or another number before that."""

from __future__ import annotations

import math

from flexperts.artifacts import RunDirectory
from flexperts.config.changes import rounds_before
from flexperts.config.run import RunConfig
from flexperts.errors import ArtifactError, ConfigError
from flexperts.files import write_text
from flexperts.methods.registry import make_method
from flexperts.observer import Observer
from flexperts.server.checkpoint import load_server


def is_extended(run: RunDirectory, config: RunConfig) -> bool:
    """Return whether a recipe differs from a run's only in the number of rounds, and the run can have that number.

    Args:
        run: A run, finished or not.
        config: The recipe.
    """
    before = rounds_before(run.config_toml, config.to_toml())
    if before is None:
        return False
    rounds, done = config.federation.rounds, finished_rounds(run)
    asked = f"federation.rounds = {rounds}"
    method = make_method(config.method)
    if run.checkpoint.exists() and (extra := method.extra_rounds(before)):
        more = "an extra round" if extra == 1 else f"{extra} extra rounds"
        rule = f"the run has {before}, and {method.name} trains {more} after its last one"
        raise ConfigError(asked, rule, "start a new run with this number of rounds")
    if rounds <= done:
        raise ArtifactError(
            asked,
            f"{run.path / 'config.toml'} has {before}, and {done} rounds are finished",
            f"set a number above {done}, or {before} to leave the run as it is",
        )
    if joined := ", ".join(run.joined()):
        raise ArtifactError(
            f"{run.path}",
            f"{joined} joined after round {done}, and a joined client needs the shared weights to stay as they are",
            "start a new run with them among the clients, or undo the joining (docs/joining.md)",
        )
    return True


def finished_rounds(run: RunDirectory) -> int:
    """Return how many rounds of a run are finished."""
    if not run.checkpoint.exists() and not run.has_rounds():
        return 0
    return load_server(run.checkpoint).round


def extend(run: RunDirectory, config: RunConfig, observer: Observer) -> None:
    """Give a run the recipe's number of rounds, after ``is_extended`` has returned True.

    The results of the last round are deleted: they are made again after the new last round. If the process is
    killed here, the run is unfinished, with the old recipe or the new one.
    """
    before, done = rounds_before(run.config_toml, config.to_toml()), finished_rounds(run)
    for stale in (run.path / "summary.json", run.beyond):
        stale.unlink(missing_ok=True)
    write_text(run.path / "config.toml", config.to_toml())
    rounds = config.federation.rounds
    share = rate(done / rounds, config.training.warmup_ratio)
    observer.notice(
        f"{config.method.name}: {done} of {before} planned rounds are finished; from here on the learning rate's "
        f"cosine is over {rounds} rounds, so round {done + 1} starts at {100 * share:.0f} % of the peak rate"
    )


def rate(passed: float, warmup: float) -> float:
    """Return the learning rate, divided by its peak, after a share of a run's steps.

    Args:
        passed: The share of the steps that are done, 0 to 1.
        warmup: The share of the steps that are warm-up.
    """
    if passed < warmup:
        return passed / warmup
    return 0.5 * (1 + math.cos(math.pi * (passed - warmup) / (1 - warmup)))
