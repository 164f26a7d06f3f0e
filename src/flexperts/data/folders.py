"""A folder with one subfolder per client: which subfolders are clients, and why others are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from flexperts.config.data import ClientFiles
from flexperts.data.records import ENDINGS, Say, name_and_ending
from flexperts.errors import DataError

_SIDES = ("train", "test")
_SHOWN = 10


def client_folders(folder: Path, say: Say) -> dict[str, ClientFiles]:
    """Return each subfolder's train and test file, by the subfolder's name.

    Hidden files and folders, and files called README, are ignored. Everything else that is not read is reported.

    Args:
        folder: The folder.
        say: Called with one line per reason why something is not read.
    """
    clients: dict[str, ClientFiles] = {}
    idle: dict[str, list[str]] = defaultdict(list)
    loose = []
    for entry in _entries(folder):
        if not entry.is_dir():
            loose.append(entry.name)
            continue
        files, others = _sides(entry)
        if files:
            clients[entry.name] = ClientFiles(**files)
        reason = "not read" if files else "not a client, as it has no file train.*; it contains"
        if others or not files:
            idle[f"{reason}: {_some(others) or 'nothing'}"].append(entry.name)
    told = [f"{folder}: {_some(names)}: {reason}" for reason, names in idle.items()]
    told += [f"{folder}: not read, as it is not in a client's folder: {_some(loose)}"] if loose else []
    if not clients:
        raise DataError(
            "; ".join([f"data.folder = {folder}", *told]),
            f"it must contain <client>/train.jsonl files (or {', '.join(e for e in ENDINGS if e != '.jsonl')})",
            "add a subfolder with a train file per client; `flexperts data make-silos` writes an example",
        )
    for line in told:
        say(line)
    return clients


def _sides(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return a subfolder's train and test file, and the names of its other entries."""
    entries = _entries(folder)
    found: dict[str, list[Path]] = {side: [] for side in _SIDES}
    for path in entries:
        if name_and_ending(path)[0].lower() in _SIDES and not path.is_dir():
            found[name_and_ending(path)[0].lower()].append(path)
    for side, paths in found.items():
        found[side] = paths = [p for p in paths if name_and_ending(p)[1] in ENDINGS] or paths
        if len(paths) > 1:
            raise DataError(
                f"{folder}: {_some(p.name for p in paths)}",
                f"a client has one {side} file",
                "merge them, or move the others out of this folder",
            )
    if found["test"] and not found["train"]:
        raise DataError(
            f"{folder}: {found['test'][0].name} and no file train.*",
            "a client needs rows to train on",
            "add a train file to this folder",
        )
    files = {side: str(paths[0]) for side, paths in found.items() if paths}
    return files, [path.name for path in entries if str(path) not in files.values()]


def _entries(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder, without hidden files and READMEs."""
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        reason = "there is no such folder" if not folder.exists() else f"it cannot be read ({error})"
        raise DataError(
            f"data.folder = {folder}",
            f"it must contain <client>/train.jsonl files, and {reason}",
            "check the path; in a recipe it is relative to the recipe's folder",
        ) from error
    return [e for e in entries if not e.name.startswith(".") and name_and_ending(e)[0].lower() != "readme"]


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
