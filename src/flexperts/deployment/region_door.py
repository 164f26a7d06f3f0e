"""Where a region's root asks: a Unix socket in the region's run directory, as a silo's worker has one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.listening import listening, serve_requests
from flexperts.deployment.state import socket_of
from flexperts.errors import logged
from flexperts.files import write_bytes
from flexperts.observer import Observer
from flexperts.recipe import parse_recorded
from flexperts.server.region import Region, check_same

log = logging.getLogger(__name__)


def serve_region(grid: Grid, config: RunConfig, run: RunDirectory, name: str, observer: Observer) -> None:
    """Gather a region's silos, then answer its root until the last round has been evaluated.

    Args:
        grid: Where the silos are.
        config: The region's run.
        run: Its run directory.
        name: The region's name at the root.
        observer: Receives progress.
    """
    door = RegionDoor(Region(name, grid, config, run, observer), run.path / "region")
    with listening(door.folder) as listener:
        observer.stage(f"the root's SuperNode asks at {socket_of(door.folder)}")
        most = config.federation.max_message_bytes
        serve_requests(listener, door.reply, most, until=lambda: door.closed)


class RegionDoor:
    """Replies of a region, packed by ``wire``; the last ones are kept, so that a repeated request gets the same.

    Args:
        region: The region.
        folder: Where replies are kept.
    """

    def __init__(self, region: Region, folder: Path) -> None:
        self.region, self.folder = region, folder
        self.closed = False
        """Whether the root has the last evaluation; a finished region that is started again gives it once more."""

    def reply(self, request: bytes | None) -> bytes:
        """Return the reply to a request; None is one that was too long to be read.

        An error reply names the error's class alone, because its text may name silos; the region's log has it.
        """
        try:
            if request is None:
                raise ValueError("the request is longer than federation.max_message_bytes")
            fields, content = deserialize(request)
            check_same(parse_recorded(fields["recipe"]), self.region.config)
            if fields["kind"] not in ("train", "evaluate"):
                return serialize({}, self.region.answer(fields["kind"], content))
            reply = self._once(fields["kind"], hashlib.sha256(request).digest(), content)
            self.closed = fields["kind"] == "evaluate" and self.region.finished
            return reply
        except Exception as error:  # the region must survive any error
            log.error("%s", logged(error))
            return serialize({"error": type(error).__name__})

    def _once(self, kind: str, digest: bytes, content: RecordDict) -> bytes:
        file = self.folder / f"{kind}.reply"
        kept = file.read_bytes() if file.exists() else b""
        reply = kept[2 * len(digest) :]
        if kept != digest + hashlib.sha256(reply).digest() + reply:
            if kept.startswith(digest):
                log.warning("%s is damaged: the region answers anew", file.name)
            reply = serialize({}, self.region.answer(kind, content))
            write_bytes(file, digest + hashlib.sha256(reply).digest() + reply)
        self.region.settle()
        return reply
