"""The part of a recipe that is sent to silos, a silo's own settings in it, and the folder of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from flexperts.config.data import ClientFiles, DataConfig
from flexperts.config.evaluation import KnowledgeConfig
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.errors import ConfigError
from flexperts.methods.registry import method_class
from flexperts.protection.pipeline import check_apart

_PLACES: dict[str, Any] = {"device": "auto", "device_map": None, "max_memory": {}, "offload_folder": None}
"""Defaults for settings that each silo decides: device and memory of the base."""


def at_silos(config: RunConfig) -> RunConfig:
    """Return the recipe for silos: without paths, device and reference method.

    Silos have their own rows and device. A reference method would be a second run; callers tell users so.
    """
    _refuse_what_needs_all_rows(config)
    check_apart(config)
    parts = {
        "data": _at_silos(config.data),
        "model": config.model.model_copy(update=_PLACES),
        "method": config.method.model_copy(update={"reference": None}),
        "knowledge": KnowledgeConfig(),
    }
    return config.model_copy(update=parts)


def for_silo(config: RunConfig, silo: SiloConfig) -> RunConfig:
    """Return a run with a silo's own rows, base, device and trust_remote_code instead of the recipe's.

    Args:
        config: The recipe, which is received from the server: no path in it is used.
        silo: The silo's settings.
    """
    files = ClientFiles(**dict(silo.data))
    data = _kept(config.data) | {"clients": {silo.name: files}}
    own = {"base": silo.base, "device": silo.device, "trust_remote_code": silo.trust_remote_code}
    parts = {
        "data": DataConfig.model_validate(data),
        "model": config.model.model_copy(update=own),
        "knowledge": KnowledgeConfig(),
    }
    return config.model_copy(update=parts)


def _at_silos(data: DataConfig) -> DataConfig:
    return DataConfig.model_validate(_kept(data) | {"at_silos": True})


def _kept(data: DataConfig) -> dict[str, object]:
    """Return the settings for holding out rows, which the run decides for all silos."""
    return data.held_out()


def _refuse_what_needs_all_rows(config: RunConfig) -> None:
    asked = {
        f"method.name = {config.method.name!r}": method_class(config.method.name).pools_rows,
        f"evaluation.others_rows = {config.evaluation.others_rows}": config.evaluation.others_rows > 0,
        f"knowledge.general = {config.knowledge.general!r}": config.knowledge.general is not None,
        f"knowledge.mmlu = {config.knowledge.mmlu!r}": config.knowledge.mmlu is not None,
    }
    if found := [setting for setting, is_asked in asked.items() if is_asked]:
        raise ConfigError(
            ", ".join(found),
            "it needs all clients in one process, and each silo is a separate process",
            "leave it out, or run in this process (without --engine)",
        )


RUNS = "FLEXPERTS_RUNS"
"""Environment variable of the SuperLink: the folder for run directories; ``runs`` if it is not set."""
METRICS = "FLEXPERTS_METRICS"
"""Environment variable of the SuperLink: the folder for the metrics of runs; none are written if it is not set."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def run_folder(name: str) -> Path:
    """Return the folder of a run; its name is received from outside, so it must not be a path."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--out {name!r}",
            "a deployed run has a name of letters, digits, '.', '_' and '-', not a path",
            f"choose such a name; the SuperLink's {RUNS} sets the folder that holds it",
        )
    return Path(os.environ.get(RUNS, "runs")) / name
