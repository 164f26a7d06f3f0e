"""Where a region's root asks: a Unix socket in the region's run directory, as a silo's worker has one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.deployment.listening import listening, serve_requests
from flexperts.deployment.state import socket_of
from flexperts.errors import logged
from flexperts.files import write_bytes
from flexperts.observer import Observer
from flexperts.recipe import parse_recipe
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
    region, folder = Region(name, grid, config, run, observer), run.path / "region"
    with listening(folder) as listener:
        observer.stage(f"the root's SuperNode asks at {socket_of(folder)}")
        serve_requests(
            listener,
            lambda request: _reply(region, folder, request),
            config.federation.max_message_bytes,
            until=lambda: region.finished,
        )


def _reply(region: Region, folder: Path, request: bytes | None) -> bytes:
    """Return the reply to a request; the last ones are kept, so that a request that is repeated gets the same.

    An error reply names the error's class alone, because its text may name silos; the region's log has it.
    """
    try:
        if request is None:
            raise ValueError("the request is longer than federation.max_message_bytes")
        fields, content = deserialize(request)
        kind = fields["kind"]
        check_same(parse_recipe(fields["recipe"]), region.config)
        digest, kept = hashlib.sha256(request).digest(), folder / f"{kind}.reply"
        if kind in ("train", "evaluate"):
            before = kept.read_bytes() if kept.exists() else b""
            if before[: len(digest)] == digest:
                return before[len(digest) :]
        reply = serialize({}, region.answer(kind, content))
        if kind in ("train", "evaluate"):
            write_bytes(kept, digest + reply)
        return reply
    except Exception as error:  # the region must survive any error
        log.error("%s", logged(error))
        return serialize({"error": type(error).__name__})
