"""The server's address and limits; quick to import, because the command line shows the defaults."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from flexperts.errors import ConfigError

if TYPE_CHECKING:
    from flexperts.serving.http.door import Door


@dataclass(frozen=True)
class Address:
    """The address on which the server listens.

    Args:
        host: Name or address of an interface of this machine.
        port: TCP port; 0 takes a free one.
        certificate: File of a TLS certificate in PEM format; None serves plain HTTP.
        key: File of the certificate's private key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def listen(self, connections: int) -> Door:
        """Return a socket that listens on this address.

        Args:
            connections: Most connections of callers who have not shown a key.
        """
        from flexperts.serving.http.door import Door  # it imports asyncio, which `--help` does not need

        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return Door(socket.create_server((self.host, self.port), family=family), connections)
        except (OSError, OverflowError, UnicodeError) as error:
            where = f"--host {self.host} --port {self.port}"
            raise ConfigError(
                where, f"the server cannot listen on this address ({error})", "choose another host or port"
            ) from error

    def url(self, door: socket.socket) -> str:
        """Return the URL of a listening socket."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{door.getsockname()[1]}"


_BYTES = 16
"""Bytes of a prompt for each token that it may have; texts have three to six per token."""


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Args:
        queue: Most requests that wait for a place in a batch.
        per_client: Most requests in progress for all keys of one client; the operator's are not limited.
        answer_tokens: Longest answer that a request may ask for, and the default, in tokens.
        prompt_tokens: Longest prompt, in tokens; None means the context is the only limit.
        body_bytes: Longest request body, in bytes.
        seconds: Longest time from a request to the end of its answer.
        prompt_bytes: Longest prompt in bytes of UTF-8, checked before it is tokenized; None means 16 for
            each token that a prompt may have.
        connections: Most connections of callers who have not shown a key.
    """

    queue: int = 64
    per_client: int = 8
    answer_tokens: int = 512
    prompt_tokens: int | None = None
    body_bytes: int = 1 << 20
    seconds: float = 300.0
    prompt_bytes: int | None = None
    connections: int = 256

    def longest_prompt(self, context: int) -> int:
        """Return the bytes of the longest prompt.

        Args:
            context: The engine's context, in tokens.
        """
        return self.prompt_bytes or _BYTES * min(context, self.prompt_tokens or context)
