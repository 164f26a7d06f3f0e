"""Where a deployed run lies on the SuperLink's machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flexperts.errors import ConfigError

RUNS = "FLEXPERTS_RUNS"
"""Environment variable of the SuperLink: the folder that run directories are made in; ``runs`` without it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def run_folder(name: str) -> Path:
    """Return the folder of a run; its name comes from outside and is therefore no path.

    Raises:
        ConfigError: It could be one.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--out {name!r}",
            "a deployed run has a name of letters, digits, '.', '_' and '-', not a path",
            f"choose such a name; the SuperLink's {RUNS} says in which folder it lies",
        )
    return Path(os.environ.get(RUNS, "runs")) / name
