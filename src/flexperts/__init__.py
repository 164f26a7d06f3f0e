"""Personalized federated fine-tuning of Mixture-of-Experts language models.

The names below, and those of ``flexperts.testing``, are the public API; all other modules are internal. Names are
imported when they are first used, so that ``import flexperts`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexperts.artifacts import RunDirectory
    from flexperts.communication.messages import Update
    from flexperts.config.run import RunConfig
    from flexperts.engines.run import run_federation
    from flexperts.errors import FlexpertsError
    from flexperts.finished.joining import join
    from flexperts.library.callbacks import Callback
    from flexperts.library.federate import federate
    from flexperts.library.personal import PersonalModel
    from flexperts.library.run import Run
    from flexperts.methods.kit.method import Method
    from flexperts.methods.kit.server_state import Server
    from flexperts.methods.registry import method_names, register_method
    from flexperts.moe.experts import find_experts
    from flexperts.observer import Observer
    from flexperts.parameters.split import split_parameters
    from flexperts.parameters.store import load_personal
    from flexperts.parts.graft_file import load_grafts, save_grafts
    from flexperts.parts.grafts import Grafts
    from flexperts.protection.protection import Protection
    from flexperts.recipe import load_recipe, parse_recipe
    from flexperts.selection.selection import reconstruction_scores
    from flexperts.smol_moe.build import build_base
    from flexperts.studies.collect import collect_run

__version__ = "0.1.0"

_HOMES = {
    "Callback": "library.callbacks",
    "FlexpertsError": "errors",
    "Grafts": "parts.grafts",
    "Method": "methods.kit.method",
    "Observer": "observer",
    "PersonalModel": "library.personal",
    "Protection": "protection.protection",
    "Run": "library.run",
    "RunConfig": "config.run",
    "RunDirectory": "artifacts",
    "Server": "methods.kit.server_state",
    "Update": "communication.messages",
    "build_base": "smol_moe.build",
    "collect_run": "studies.collect",
    "federate": "library.federate",
    "find_experts": "moe.experts",
    "join": "finished.joining",
    "load_grafts": "parts.graft_file",
    "load_personal": "parameters.store",
    "load_recipe": "recipe",
    "method_names": "methods.registry",
    "parse_recipe": "recipe",
    "reconstruction_scores": "selection.selection",
    "register_method": "methods.registry",
    "run_federation": "engines.run",
    "save_grafts": "parts.graft_file",
    "split_parameters": "parameters.split",
}
__all__ = [
    "Callback",
    "FlexpertsError",
    "Grafts",
    "Method",
    "Observer",
    "PersonalModel",
    "Protection",
    "Run",
    "RunConfig",
    "RunDirectory",
    "Server",
    "Update",
    "build_base",
    "collect_run",
    "federate",
    "find_experts",
    "join",
    "load_grafts",
    "load_personal",
    "load_recipe",
    "method_names",
    "parse_recipe",
    "reconstruction_scores",
    "register_method",
    "run_federation",
    "save_grafts",
    "split_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "TrainedRun":
        from warnings import warn

        warn("flexperts.TrainedRun is deprecated: use flexperts.Run, until 0.3", DeprecationWarning, stacklevel=2)
        return import_module("flexperts.finished.trained").TrainedRun
    if name not in _HOMES:
        raise AttributeError(f"module 'flexperts' has no attribute {name!r}")
    return getattr(import_module(f"flexperts.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
