"""The terminal as commands write to it: every text as it is, whatever letters the terminal has."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes no text for markup or emoji codes: paths, names and answers hold anything."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def take_names_as_utf8() -> None:
    """Start this process again where Python takes arguments and names of files for anything but UTF-8.

    Names of clients are UTF-8 in all files' names; in another encoding, which an old locale may ask for, such files
    could not be opened. What is printed keeps the terminal's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    shown = {"PYTHONIOENCODING": sys.stdout.encoding} if sys.stdout else {}
    os.execve(sys.executable, sys.orig_argv, {**shown, **os.environ, "PYTHONUTF8": "1"})


def escape_what_cannot_be_shown() -> None:
    """Print letters that the terminal's encoding lacks as escapes, such as ``\\u4e2d``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
