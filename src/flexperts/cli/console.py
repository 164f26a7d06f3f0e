"""The terminal as commands write to it: every text as it is, whatever letters the terminal has."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes no text for markup or emoji codes: paths, names and answers hold anything."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def escape_what_cannot_be_shown() -> None:
    """Print letters that the terminal's encoding lacks as escapes, such as ``\\u4e2d``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
