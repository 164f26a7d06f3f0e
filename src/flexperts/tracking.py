"""A run's numbers in experiment trackers (TensorBoard, W&B, MLflow, ...), through accelerate's tracker classes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from flexperts.config.changes import flat
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.files import placeless
from flexperts.observer import Observer

PROJECT = "flexperts"
"""Name of the project that holds all runs, for trackers that do not write to a directory."""

# Both delete an earlier run when one with the same name starts; reference and resumed runs reuse names.
_FORGETFUL = {"clearml", "dvclive"}


class Tracking(Observer):
    """Observer that sends a run's numbers to trackers: the recipe when rounds begin, then every finished round.

    The method's rounds and the reference's are two runs in a tracker, ``METHOD`` and ``reference/METHOD``, so that
    their curves are in the same plots. A resumed run tracks the rounds that are left. Texts, weights and tensors
    are not among an observer's events, so no tracker receives them.

    Args:
        names: Names of trackers in accelerate.
        config: The run.
        out: The run directory; a tracker that writes files uses the sub-folder with its name.
        name: Name of the run in trackers; by default the directory's name.
    """

    def __init__(self, names: Sequence[str], config: RunConfig, out: Path, *, name: str | None = None) -> None:
        self._classes = tracker_classes(names)
        self._config, self._out = config, out.resolve()
        self._name = name or self._out.name
        self._trackers: list[Any] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Start a run for the method in every tracker, with the recipe as hyperparameters."""
        self.close()
        # The reference's rounds begin when the method's own summary is written.
        is_reference = self._config.method.reference and (self._out / "summary.json").exists()
        config = self._config.with_method(method) if is_reference else self._config
        run = f"reference/{method}" if is_reference else method
        settings = {"run": f"{self._name}/{run}", **hyperparameters(config)}
        for name in self._classes:
            self._start(name, run, settings)

    def round(self, record: Mapping[str, Any]) -> None:
        """Log a finished round's numbers; the step is the round's number."""
        for tracker in self._trackers:
            tracker.log(scalars(record), step=record["number"])

    def close(self) -> None:
        """Finish the open run in every tracker."""
        self._trackers = []
        self._open.close()

    def _start(self, name: str, run: str, settings: Mapping[str, Any]) -> None:
        PartialState()  # trackers log through accelerate, which needs this
        make = self._classes[name]
        # The first argument is the run's name for trackers with a directory, else the project's name.
        tracker = make(run, str(self._out / name)) if make.requires_logging_directory else make(PROJECT)
        try:
            tracker.start()
        except Exception as error:  # each tracker has different errors
            raise ConfigError(f"tracker {name!r}", f"it cannot start ({error})", "see its manual") from error
        self._open.callback(tracker.finish)
        tracker.store_init_configuration(dict(settings))
        self._trackers.append(tracker)


def tracker_names() -> list[str]:
    """Return the names of all trackers, installed or not, sorted."""
    return sorted(LOGGER_TYPE_TO_CLASS.keys() - _FORGETFUL)


def tracker_classes(names: Sequence[str]) -> dict[str, Any]:
    """Return the trackers' classes by name."""
    return {name: _tracker_class(name) for name in names}


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Return a recipe as flat settings, such as ``training.lr``; lists become text.

    Paths are cut to their last part: the rest describes the machine.
    """
    settings = flat(placeless(tomllib.loads(config.to_toml())))
    return {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in settings.items()}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's numbers by tag.

    Args:
        record: A line of ``rounds.jsonl``.

    Returns:
        ``loss``, ``METRIC/STATE``: ``/clients/NAME`` and their plain ``/mean``. ``bytes_up``, ``bytes_down``:
        encoded bytes of the training messages, ``/clients/NAME`` and ``/total``. ``seconds/PHASE``: wall time.
    """
    tags = {f"seconds/{phase}": value for phase, value in record["seconds"].items()}
    for group, values in _by_client(record).items():
        tags |= {f"{group}/clients/{client}": value for client, value in values.items()}
        tags[f"{group}/mean"] = sum(values.values()) / len(values)
    for group, sizes in (("bytes_up", record["uplink"]), ("bytes_down", record["downlink"])):
        tags |= {f"{group}/clients/{client}": size for client, size in sizes.items()}
        tags[f"{group}/total"] = sum(sizes.values())
    return tags


def _by_client(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return loss and scores as group -> client -> value; a round without some of them has no such group."""
    groups: dict[str, dict[str, float]] = {}
    losses = {client: metrics["loss"] for client, metrics in record["clients"].items() if "loss" in metrics}
    if losses:
        groups["loss"] = losses
    for client, scores in record["scores"].items():
        for key, value in scores.items():
            if "." in key and value is not None:  # else it is a count of rows, or not finite
                groups.setdefault(key.replace(".", "/", 1), {})[client] = value
    return groups


def _tracker_class(name: str) -> Any:
    if name not in tracker_names():
        raise ConfigError(f"tracker {name!r}", "there is no such tracker", f"known: {', '.join(tracker_names())}")
    # A class that a user has registered with accelerate is not a LoggerType, and needs no package check.
    if name in LoggerType.list() and name not in map(str, get_available_trackers()):
        package = "'flexperts[tensorboard]'" if name == "tensorboard" else name
        raise ConfigError(f"tracker {name!r}", "its package is not installed", f"run pip install {package}")
    return LOGGER_TYPE_TO_CLASS[name]
