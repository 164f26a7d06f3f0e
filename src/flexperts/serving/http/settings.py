"""Where the server listens and how much it takes on; light to import, as the command line shows the defaults."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from flexperts.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """Where the server listens.

    Args:
        host: Name or address of an interface of this machine.
        port: TCP port; 0 takes a free one.
        certificate: File of a TLS certificate in PEM; None serves plain HTTP.
        key: File of its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def listen(self) -> socket.socket:
        """Return a socket that listens there.

        Raises:
            ConfigError: It is taken, or is none of this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except (OSError, OverflowError, UnicodeError) as error:
            where = f"--host {self.host} --port {self.port}"
            raise ConfigError(where, f"nothing can listen there ({error})", "choose another") from error

    def url(self, door: socket.socket) -> str:
        """Return the URL of a listening socket."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{door.getsockname()[1]}"


@dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Args:
        queue: Requests that may wait for a place in a batch.
        per_client: Requests that one client's keys together may have in work; the operator's are not counted.
        answer_tokens: Longest answer that may be asked for, and the default.
        prompt_tokens: Longest prompt; None leaves it to the context.
        body_bytes: Longest request body.
        seconds: Longest time from a request to the end of its answer.
    """

    queue: int = 64
    per_client: int = 8
    answer_tokens: int = 512
    prompt_tokens: int | None = None
    body_bytes: int = 1 << 20
    seconds: float = 300.0
