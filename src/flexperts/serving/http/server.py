"""The uvicorn server of the application: TLS, its thread, and how it stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from flexperts.errors import ConfigError
from flexperts.serving.http.api import make_app
from flexperts.serving.http.door import Door
from flexperts.serving.http.service import Service
from flexperts.serving.http.settings import Address

_HEADERS = 16 << 10
"""Longest head of a request, in bytes."""
_BACKLOG = 64
"""Most connections that are accepted before one of them is read; fewer than may wait."""
_LAST_WORDS = 5
"""Seconds for which callers can still read how their requests ended."""


def make_server(service: Service, address: Address) -> uvicorn.Server:
    """Return a server, to be run on a listening socket.

    Args:
        service: The service.
        address: The address, with the certificate.
    """
    if address.key and not address.certificate:
        raise ConfigError(f"--tls-key {address.key}", "a key needs its certificate", "add --tls-cert")
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        loop="asyncio",  # another one would not accept connections through the door
        http="h11",  # the other parser does not bound headers
        h11_max_incomplete_event_size=_HEADERS,
        backlog=_BACKLOG,
        proxy_headers=False,  # a connection is known by its own address
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is a subclass
        files = f"--tls-cert {address.certificate}" + (f" --tls-key {address.key}" if address.key else "")
        raise ConfigError(
            files, f"the TLS files cannot be used ({error})", "give a certificate and its key in PEM format"
        ) from error
    return uvicorn.Server(config)


@contextmanager
def running(server: uvicorn.Server, service: Service, door: Door, grace: float = 30) -> Iterator[None]:
    """Run a server on a separate thread inside the block, so that loading and signals stay on the main thread.

    Args:
        server: The server, from ``make_server``.
        service: The service; it is closed at the end.
        door: The socket on which the server listens.
        grace: Seconds for which requests in progress may still run at the end; a second signal ends them at once.
    """
    service.door = door
    thread = threading.Thread(target=server.run, args=([door],), name="flexperts http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        try:
            thread.join(grace)
        finally:
            service.close()  # this ends requests that are still in progress; their callers get an error
            thread.join(_LAST_WORDS)
            server.force_exit = True
            thread.join()
