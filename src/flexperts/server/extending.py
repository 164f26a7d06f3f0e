"""Giving a run other rounds than it was started with: more after it has finished, or another number on the way."""

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
    """Tell whether a recipe is that of a run but for the number of rounds, and the run can have that number.

    Args:
        run: A run, finished or not.
        config: The recipe.

    Raises:
        ConfigError: The method has settled on its rounds.
        ArtifactError: The number is too small, the checkpoint is missing or damaged, or clients have joined the
            finished run.
    """
    before = rounds_before(run.config_toml, config.to_toml())
    if before is None:
        return False
    rounds, done = config.federation.rounds, finished_rounds(run)
    asked = f"federation.rounds = {rounds}"
    if rounds <= done:
        raise ArtifactError(
            asked,
            f"{run.path / 'config.toml'} has {before}, and {done} rounds are finished",
            f"give a number above {done}, or the run's own to leave it as it is",
        )
    method = make_method(config.method)
    if run.checkpoint.exists() and method.extra_rounds(before):
        rule = f"{method.name} has settled on {before} rounds, after which it has one of its own"
        raise ConfigError(asked, rule, "start a new run")
    if joined := ", ".join(run.joined()):
        raise ArtifactError(
            f"{run.path}",
            f"{joined} joined after round {done}, on shared weights that stand still",
            "start a new run with them among the clients, or undo the joining (docs/joining.md)",
        )
    return True


def finished_rounds(run: RunDirectory) -> int:
    """Return how many rounds of a run are finished.

    Raises:
        ArtifactError: Rounds have finished and the checkpoint is missing, or it is damaged.
    """
    if not run.checkpoint.exists() and not run.has_rounds():
        return 0
    return load_server(run.checkpoint).round


def extend(run: RunDirectory, config: RunConfig, observer: Observer) -> None:
    """Give a run the recipe's number of rounds; ``is_extended`` has been asked.

    What was made of the last round goes: it is made again after the new last one. A kill on the way leaves a run
    that has not finished, by the one recipe or by the other.
    """
    before, done = rounds_before(run.config_toml, config.to_toml()), finished_rounds(run)
    for stale in (run.path / "summary.json", run.beyond):
        stale.unlink(missing_ok=True)
    write_text(run.path / "config.toml", config.to_toml())
    rounds = config.federation.rounds
    share = rate(done / rounds, config.training.warmup_ratio)
    observer.notice(
        f"{config.method.name}: {done} rounds are finished as rounds of {before}; from here on the learning rate's "
        f"cosine is that of {rounds} rounds, so round {done + 1} starts at {100 * share:.0f} % of the peak rate"
    )


def rate(passed: float, warmup: float) -> float:
    """Return the learning rate over its peak when a share of a run's steps has passed.

    Args:
        passed: The share, 0 to 1.
        warmup: Share of the steps that warm up.
    """
    if passed < warmup:
        return passed / warmup
    return 0.5 * (1 + math.cos(math.pi * (passed - warmup) / (1 - warmup)))
