"""What a SuperNode needs of its SuperLink, against servers with other certificates and other clocks."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from flexperts.cli.main import app
from flexperts.deployment.superlink_check import check_superlink
from flexperts.errors import ConfigError

Serve = Callable[..., str]


def write_certificate(folder: Path, host: str = "localhost", days: tuple[float, float] = (-1, 1)) -> Path:
    """Write a certificate that is its own CA, and its key, in one file; valid between two days from now."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "both.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server with a certificate and a clock, and returns its address."""
    with ExitStack() as stack:

        def start(certificate: Path | None, *, ahead: float | None = 0.0) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_HEAD(self) -> None:
                    self.send_response_only(403)
                    if ahead is not None:
                        self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
                    self.end_headers()

            server = HTTPServer(("localhost", 0), Handler)
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate)
                server.socket = context.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            stack.callback(server.server_close)
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"localhost:{server.server_port}"

        yield start


def test_a_server_that_fits_is_said_to_in_one_line(serve: Serve, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    found = check_superlink(serve(certificate, ahead=200), certificate)  # Flower accepts a silo this far behind
    assert "answers with a certificate of" in found
    assert "its clock is within 20" in found
    silent = check_superlink(serve(certificate, ahead=None), certificate)
    assert "the server does not say what time it is" in silent


@pytest.mark.parametrize(
    ("ahead", "told"),
    [
        (-60, r"clock is 5\d s ahead of that of localhost:.* at most 5 s ahead or 305 s behind; set both clocks"),
        (3600, r"clock is 3(59|60)\d s behind that of localhost"),
    ],
)
def test_a_clock_is_named_before_the_certificate_that_it_makes_invalid(
    serve: Serve, tmp_path: Path, ahead: float, told: str
) -> None:
    certificate = write_certificate(tmp_path, days=(-2, -1))
    with pytest.raises(ConfigError, match=told):
        check_superlink(serve(certificate, ahead=ahead), certificate)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"days": (-2, -1)}, r"not accepted \(certificate has expired\)"),
        ({"days": (1, 2)}, r"not accepted \(certificate is not yet valid\)"),
        ({"host": "another.example"}, r"not accepted \(Hostname mismatch.*\)"),
    ],
)
def test_a_certificate_is_refused_as_a_supernode_would(
    serve: Serve, tmp_path: Path, more: dict[str, object], told: str
) -> None:
    certificate = write_certificate(tmp_path, **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=told):
        check_superlink(serve(certificate), certificate)


def test_another_ca_is_refused(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    theirs, ours = write_certificate(tmp_path / "theirs"), write_certificate(tmp_path)
    with pytest.raises(ConfigError, match=r"not accepted \(self-signed certificate\)"):
        check_superlink(serve(theirs), ours)


def test_what_cannot_be_reached_or_read_is_named(serve: Serve, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot reach it over TLS .*; check name, port, firewall"):
        check_superlink("localhost:1", certificate)
    with pytest.raises(ConfigError, match="cannot reach it over TLS"):
        check_superlink(serve(None), certificate)  # no TLS there
    with pytest.raises(ConfigError, match=r"--root-certificates .*none: it cannot be read"):
        check_superlink(serve(certificate), tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ConfigError, match="cannot be read as certificates in PEM"):
        check_superlink(serve(certificate), tmp_path / "text")
    for address in ("localhost", "https://localhost:1", "::1:443"):
        with pytest.raises(ConfigError, match="the server's name and a port"):
            check_superlink(address, certificate)


def test_the_check_of_a_silo_also_says_it(serve: Serve, silo_file: Path, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    words = ["silo", "check", str(silo_file), "--root-certificates", str(certificate), "--superlink"]
    fits = CliRunner().invoke(app, [*words, serve(certificate)], catch_exceptions=False)
    assert "answers with a certificate of" in fits.output
    with pytest.raises(ConfigError, match="clock is"):
        CliRunner().invoke(app, [*words, serve(certificate, ahead=-60)], catch_exceptions=False)
