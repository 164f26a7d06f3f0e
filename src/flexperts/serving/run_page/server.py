"""The page of a run over HTTP, on a thread: its files for everyone, the run's status for who has the key."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexperts.artifacts import RunDirectory
from flexperts.errors import FlexpertsError
from flexperts.files import json_text
from flexperts.progress import Line
from flexperts.serving.http.door import Door
from flexperts.serving.http.keys import new_key
from flexperts.serving.http.page_files import page_routes
from flexperts.serving.http.settings import Address
from flexperts.status.status import RunStatus

_EVERY = 2.0
"""Seconds between two requests of an open page, as in page.js."""
_CONNECTIONS = 32
"""Most connections of callers who have not shown the key."""
_HEADERS = 16 << 10
"""Longest head of a request, in bytes."""
_LINES = 50
"""Most lines of what is under way."""


@contextmanager
def page_of(path: Path, address: Address, under_way: Callable[[], Sequence[Line]] = lambda: ()) -> Iterator[str]:
    """Serve the page of a run inside the block; at its end, a page that is open learns how the run ended.

    The page needs a key, which is new each time: other users of this machine can reach the address, too.

    Args:
        path: The run directory, which may not exist yet.
        address: Where to listen.
        under_way: Returns what the run does now, where it is in this process.

    Yields:
        The link that opens the page, with the key behind ``#``, which browsers do not send.
    """
    key = new_key()
    with address.listen(_CONNECTIONS) as door:
        looks = _Looks(path, under_way, key, door)
        routes = [Route("/status.json", looks.answer), *page_routes("flexperts.serving.run_page")]
        server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=routes),
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                loop="asyncio",  # another one would not accept connections through the door
                http="h11",  # the other parser does not bound headers
                h11_max_incomplete_event_size=_HEADERS,
                proxy_headers=False,  # a connection is known by its own address
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, args=([door],), name="flexperts page", daemon=True)
        thread.start()
        try:
            yield f"{address.url(door)}/#key={key}"
            looks.await_last()
        finally:
            server.should_exit = True
            thread.join()


class _Looks:
    def __init__(self, path: Path, under_way: Callable[[], Sequence[Line]], key: str, door: Door) -> None:
        self._path, self._under_way, self._door = path, under_way, door
        self._expected = f"Bearer {key}".encode()
        self._status: RunStatus | None = None
        self._turn = threading.Lock()
        self._last, self._looked = float("-inf"), threading.Event()

    async def answer(self, request: Request) -> Response:
        """Return the status, or only what is under way if the status is still the one that the page has seen."""
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, self._expected):
            return self._response({"error": "the key is missing or of an earlier start"}, 401)
        self._door.keep(request.client)
        found = await run_in_threadpool(self._look, request.query_params.get("seen"))
        return self._response(found, background=BackgroundTask(self._wait, request))

    async def _wait(self, request: Request) -> None:
        self._door.wait(request.client)

    @staticmethod
    def _response(content: dict[str, Any], status: int = 200, background: BackgroundTask | None = None) -> Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(json_text(content), status, headers, "application/json", background)

    def _look(self, seen: str | None) -> dict[str, Any]:
        with self._turn:
            found: dict[str, Any] = {"under_way": [asdict(line) for line in self._under_way()[:_LINES]]}
            try:
                if self._status is None and (self._path / "config.toml").is_file():
                    self._status = RunStatus(RunDirectory(self._path))
                if self._status is not None:
                    found |= self._status.look_for_page(seen)
            except FlexpertsError as error:
                found["error"] = str(error)
            self._last = time.monotonic()
            self._looked.set()
            return found

    def await_last(self) -> None:
        """Wait until a page that is open has asked once more."""
        self._looked.clear()
        if time.monotonic() - self._last < 2 * _EVERY:
            self._looked.wait(2 * _EVERY)
