"""Kills this process with SIGKILL at a chosen place of a run where a kill could matter."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexperts.observer import Observer


class Fuse:
    """Counts the places that a run passes, and kills the process at one of them.

    Args:
        target: Kind of the place, and how many of its kind come first; None kills nowhere.
        folder: Only files in it count.
        record: Called with the kind of the place, right before the kill.
    """

    def __init__(self, target: tuple[str, int] | None, folder: Path, record: Callable[[str], None]) -> None:
        self.target, self.folder, self.record = target, folder, record
        self.passed: Counter[str] = Counter()

    def place(self, kind: str) -> None:
        if (kind, self.passed[kind]) == self.target:
            self.record(kind)
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed[kind] += 1

    def install(self) -> None:
        """Put places around every write, sync and rename of a file in the folder."""
        fsync, replace, opened, fdopened = os.fsync, Path.replace, Path.open, os.fdopen

        def counted_fsync(descriptor: int) -> None:
            self.place("before a sync")
            fsync(descriptor)
            self.place("after a sync")

        def counted_replace(path: Path, target: Path) -> Path:
            self.place("before a rename")
            renamed = replace(path, target)
            self.place("after a rename")
            return renamed

        def counted_open(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = opened(path, mode, *rest, **options)
            if set(mode) & set("wa") and path.is_relative_to(self.folder):
                return HalfwayFile(file, self, "a line" if "a" in mode else "a file")
            return file

        def counted_fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = fdopened(descriptor, mode, *rest, **options)
            if "w" in mode and Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(self.folder.resolve()):
                return HalfwayFile(file, self, "a file")
            return file

        os.fsync, os.fdopen = counted_fsync, counted_fdopen
        Path.replace, Path.open = counted_replace, counted_open  # type: ignore[assignment,method-assign]


class HalfwayFile:
    """A file whose every write passes a place before it, one in its middle, and one after it."""

    def __init__(self, file: Any, fuse: Fuse, what: str) -> None:
        self.file, self.fuse, self.what = file, fuse, what

    def write(self, content: Any) -> int:
        middle = len(content) // 2
        self.fuse.place(f"before the bytes of {self.what}")
        self.file.write(content[:middle])
        self.file.flush()
        self.fuse.place(f"amid the bytes of {self.what}")
        self.file.write(content[middle:])
        self.file.flush()
        self.fuse.place(f"after the bytes of {self.what}")
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> HalfwayFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


class FuseObserver(Observer):
    """Makes a place of every event of a run: steps, batches, selections, stages, rounds."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def stage(self, text: str) -> None:
        self.fuse.place("a stage")

    def progress(self, task: str, done: int, total: int) -> None:
        kinds = {": round": "a training step", ": selection": "a selection"}
        self.fuse.place(next((kind for word, kind in kinds.items() if word in task), "an evaluated batch"))

    def split(self, method: str, table: Any) -> None:
        self.fuse.place("the split")

    def chosen(self, client: str, choice: Any) -> None:
        self.fuse.place("a selection")

    def round(self, record: Any) -> None:
        self.fuse.place("the end of a round")
