"""The uvicorn server around the application: TLS, the thread it runs on, and how it stops."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from flexperts.errors import ConfigError
from flexperts.serving.http.api import make_app
from flexperts.serving.http.service import Service
from flexperts.serving.http.settings import Address

_LAST_WORDS = 5
"""Seconds that callers are given to read how their requests ended."""


def make_server(service: Service, address: Address) -> uvicorn.Server:
    """Return a server, to be run on a listening socket.

    Args:
        service: What it serves.
        address: Holds the certificate.

    Raises:
        ConfigError: The certificate and its key cannot be used.
    """
    if address.key and not address.certificate:
        raise ConfigError(f"--tls-key {address.key}", "a key belongs to a certificate", "give --tls-cert, too")
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        files = f"--tls-cert {address.certificate}" + (f" --tls-key {address.key}" if address.key else "")
        raise ConfigError(
            files, f"they cannot be used ({error})", "give a certificate and its key in PEM"
        ) from error
    return uvicorn.Server(config)


@contextmanager
def running(server: uvicorn.Server, service: Service, door: socket.socket, grace: float = 30) -> Iterator[None]:
    """Run a server on a thread of its own inside the block, so that loading and signals keep the main thread.

    Args:
        server: Of ``make_server``.
        service: What it serves; it is closed at the end.
        door: Where the server listens.
        grace: Seconds that requests in work are given at the end. Whatever a signal raises meanwhile cuts it short.
    """
    thread = threading.Thread(target=server.run, args=([door],), name="flexperts http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        try:
            thread.join(grace)
        finally:
            service.close()  # requests that are still in work end by it, and their callers are told
            thread.join(_LAST_WORDS)
            server.force_exit = True
            thread.join()
