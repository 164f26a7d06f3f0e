"""Submitting a run to a SuperLink with Flower's command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from flexperts.errors import ConfigError, FederationError

APP = Path(__file__).parent / "app"
"""The Flower App that is sent."""
SCHEME = "superlink://"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def connection_of(engine: str) -> str:
    """Return the name of the Flower connection in an engine, ``superlink://NAME``."""
    name = engine.removeprefix(SCHEME)
    if not engine.startswith(SCHEME) or not name:
        raise ConfigError(
            f"--engine {engine}",
            f"engines are in-process, ray and {SCHEME}NAME, NAME being a connection in Flower's config.toml",
            "see docs/deploy.md",
        )
    path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    known = _connections(path)
    if name not in known:
        raise ConfigError(
            f"--engine {engine}",
            f"{path} has {', '.join(known) or 'no connections'}",
            f"add [superlink.{name}] to it; see docs/deploy.md",
        )
    return name


def _connections(path: Path) -> list[str]:
    """Return the names of the SuperLinks in Flower's config.toml."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig")).get("superlink", {})
    except (OSError, ValueError):
        return []
    return sorted(name for name, value in found.items() if isinstance(value, dict))


def submit(recipe: str, out: str, connection: str, *, resume: bool = False, region: str = "") -> int:
    """Start a run on a SuperLink and return its id there.

    Args:
        recipe: The recipe's text.
        out: The run's name.
        connection: Name of the connection in Flower's config.toml.
        resume: Continue the run of that name.
        region: The name under which the run is a client of another one; empty for a run of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "run.toml"
        settings.write_text(
            tomli_w.dumps({"recipe": recipe, "out": out, "resume": resume, "region": region}), encoding="utf-8"
        )
        answer = _flwr("run", str(APP), connection, "--run-config", str(settings), "--format", "json")
    return int(_read(answer)["run-id"])


def follow(run_id: int, connection: str) -> str:
    """Show a run's log until it ends, and return its final status, such as ``finished:completed``."""
    subprocess.run([_command(), "log", str(run_id), connection, "--stream"], env=_environment(), check=False)
    runs = _read(_flwr("list", connection, "--run-id", str(run_id), "--format", "json"))["runs"]
    return str(runs[0]["status"])


def _flwr(*arguments: str) -> str:
    done = subprocess.run([_command(), *arguments], env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise FederationError(
            f"flwr {arguments[0]}: {said}", "the SuperLink must accept the run", "see docs/deploy.md"
        )
    return done.stdout


def _read(answer: str) -> Any:
    """Return the JSON value in a command's output, without the lines that Flower prints before it."""
    found = json.loads(answer[answer.index("{") :])
    if not found.get("success", True):
        raise FederationError(
            f"Flower says: {found.get('error-message')}", "the SuperLink must accept the run", "see docs/deploy.md"
        )
    return found


def _command() -> str:
    beside = Path(sys.executable).with_name("flwr")
    return str(beside) if beside.exists() else shutil.which("flwr") or "flwr"


def _environment() -> dict[str, str]:
    return _QUIET | dict(os.environ)
