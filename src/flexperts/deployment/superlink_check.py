"""What a SuperNode needs of its SuperLink, checked before it starts: address, certificate, clock."""

from __future__ import annotations

import re
import ssl
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from flexperts.errors import ConfigError

_ADDRESS = re.compile(
    r"\[(?P<literal>[0-9A-Fa-f:.]+)\]:(?P<its>[0-9]{1,5})|(?P<host>[^:\[\]]+):(?P<port>[0-9]{1,5})"
)
AHEAD, BEHIND = 5, 305
"""Seconds by which Flower lets a SuperNode's clock differ from the SuperLink's."""
_SECONDS = 15.0
"""How long an answer may take."""


def check_superlink(superlink: str, certificates: Path) -> str:
    """Reach a SuperLink as a SuperNode does, send nothing of the silo's, and say in one line what was found.

    The clocks are compared first: a certificate that is "expired" or "not yet valid" is often a clock that is off.

    Args:
        superlink: HOST:PORT, as for ``flower-supernode --superlink``.
        certificates: File of the CA's certificates, in PEM.

    Raises:
        ConfigError: The server does not answer, the clocks differ by more than Flower accepts, or the certificate
            is not accepted.
    """
    address = _ADDRESS.fullmatch(superlink)
    if address is None:
        rule = "it must be the server's name and a port, such as server.example:443"
        raise ConfigError(f"--superlink {superlink!r}", rule, "give it as the SuperNode gets it")
    host, port = address["literal"] or address["host"], int(address["its"] or address["port"])
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    before = time.time()
    told = _date(superlink, host, port, anyone)
    if told is None:
        clock = "the server does not say what time it is"
    else:
        _check_clock(superlink, earliest=before - told - 1, latest=time.time() - told)  # a date has whole seconds
        clock = (
            f"its clock is within {max(abs(before - told - 1), abs(time.time() - told)):.0f} s of this machine's"
        )
    _date(superlink, host, port, _trusting(certificates))
    return f"{superlink}: answers with a certificate of {certificates}; {clock}"


def _check_clock(superlink: str, earliest: float, latest: float) -> None:
    if earliest <= AHEAD and latest >= -BEHIND:
        return
    off = f"{int(earliest)} s ahead of" if earliest > 0 else f"{int(-latest)} s behind"  # at least
    raise ConfigError(
        f"this machine's clock is {off} that of {superlink}",
        f"Flower accepts a SuperNode whose clock is at most {AHEAD} s ahead or {BEHIND} s behind",
        "set both clocks (timedatectl says whether they are synchronized)",
    )


def _trusting(certificates: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(certificates))
    except OSError as error:
        rule = f"it cannot be read as certificates in PEM ({type(error).__name__})"
        raise ConfigError(
            f"--root-certificates {certificates}", rule, "ask the server's operator for it"
        ) from error


def _date(superlink: str, host: str, port: int, trust: ssl.SSLContext) -> float | None:
    """Ask for a page that nobody has, and return the Unix time of the answer, or None if it has none."""
    connection = HTTPSConnection(host, port, context=trust, timeout=_SECONDS)
    try:
        connection.request("HEAD", "/v1/fleet/")
        date = connection.getresponse().getheader("Date")
        return parsedate_to_datetime(date).timestamp() if date else None
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate of {superlink}",
            f"it is not accepted ({error.verify_message})",
            "the server's operator must replace it, or give you the CA's certificate that belongs to it",
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise ConfigError(
            superlink,
            f"a SuperNode cannot reach it over TLS ({type(error).__name__}: {error})",
            "check name, port, firewall, and that the server's proxy runs",
        ) from error
    finally:
        connection.close()
