"""The terminal: commands print every text unchanged, or escaped if the terminal's encoding lacks a letter."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints markup and emoji codes as plain text: paths, names and answers hold anything."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def take_names_as_utf8() -> None:
    """Restart this process in UTF-8 mode if Python reads arguments and file names in another encoding.

    File names that hold client names are UTF-8; with the encoding of an old locale they could not be opened. Output
    keeps the terminal's encoding.
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
