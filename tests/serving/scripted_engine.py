"""An engine that answers from a line of script instead of a model, and a real HTTP server around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from prometheus_client.parser import text_string_to_metric_families

from flexperts.errors import DataError, FlexpertsError, ServingError
from flexperts.serving.contract import Counters, Message, ModelName, Piece, Sampling
from flexperts.serving.http.keys import OPERATOR, KeyRing, hash_of
from flexperts.serving.http.server import make_server, running
from flexperts.serving.http.service import Service
from flexperts.serving.http.settings import Address, Limits

KEYS = {"clinic": "fx-of-the-clinic", "shop": "fx-of-the-shop", OPERATOR: "fx-of-the-operator"}
ASK: Any = [{"role": "user", "content": "how are you"}]
STATES: Any = ("zero_shot", "global", "personalized")


@dataclass
class Asked:
    """A request as the engine got it."""

    model: str
    sampling: Sampling
    ended: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: list[Piece] = field(default_factory=list)

    def cancel(self) -> None:
        if not self.ended.is_set():
            self.cancelled.set()


class ScriptedEngine:
    """Answers `MODEL: QUESTION`, a word a token, each on a thread of its own.

    Args:
        clients: Whose models there are.
        rows: Requests that are answered at a time.
    """

    context_length = 2000

    def __init__(self, clients: Sequence[str] = ("clinic", "shop"), rows: int = 4) -> None:
        self.models = tuple(ModelName(client, state) for client in clients for state in STATES)
        self.rows, self.pause = rows, 0.0
        self.gate = threading.Event()  # while it is closed, answers wait behind as many words as are free
        self.gate.set()
        self.free = 0
        self.asked: list[Asked] = []
        self.conversations: list[list[Message]] = []
        self.failure: FlexpertsError | None = None
        self.fault: FlexpertsError | None = None
        self.counters = Counters()
        self._room = threading.Semaphore(rows)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def queue_length(self) -> int:
        return max(0, self._open() - self.rows)

    @property
    def running(self) -> int:
        return min(self._open(), self.rows)

    def prompt_tokens(self, messages: Sequence[Message], model: ModelName | None = None) -> list[int]:
        self.conversations.append([*messages])
        tokens = [*messages[-1]["content"].encode()]
        if len(tokens) > self.context_length:
            raise DataError(f"a prompt of {len(tokens)} tokens", "the context holds 2000", "shorten it")
        return tokens

    def submit(
        self, model: ModelName, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Asked:
        if self.failure:
            raise ServingError("the engine", "it is closed", "start it again")
        asked = Asked(str(model), sampling)
        self.asked.append(asked)
        words = f"{model}: {bytes(prompt).decode()}".split(" ")
        thread = threading.Thread(target=self._answer, args=(asked, words, on_piece))
        self._threads.append(thread)
        thread.start()
        return asked

    def close(self) -> None:
        for asked in self.asked:
            asked.cancel()
        self.gate.set()
        for thread in self._threads:
            thread.join()

    def _open(self) -> int:
        return sum(not asked.ended.is_set() for asked in self.asked)

    def _answer(self, asked: Asked, words: list[str], on_piece: Callable[[Piece], None]) -> None:
        with self._room:
            for piece in self._pieces(asked, words):
                asked.pieces.append(piece)
                if piece.finish:
                    asked.ended.set()
                on_piece(piece)
        with self._lock:
            self.counters = replace(self.counters, steps=self.counters.steps + len(asked.pieces))

    def _pieces(self, asked: Asked, words: list[str]) -> Iterator[Piece]:
        for index, word in enumerate(words):
            while index >= self.free and not self.gate.wait(0.005) and not asked.cancelled.is_set():
                pass
            time.sleep(self.pause)
            if asked.cancelled.is_set():
                yield Piece("", 0, "cancelled")
                return
            if index and self.fault:
                yield Piece("", 0, "error", self.fault)
                return
            if index == asked.sampling.max_new_tokens:
                yield Piece("", 0, "length")
                return
            yield Piece(word if index == 0 else f" {word}", 1)
        yield Piece("", 0, "stop")


@dataclass(frozen=True)
class Served:
    """A server on a free port of the loopback."""

    url: str
    service: Service


@contextmanager
def served(
    engine: Any,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
    *,
    address: Address = Address(port=0),  # noqa: B008
    ready: bool = True,
    grace: float = 30,
) -> Iterator[Served]:
    """Serve an engine by HTTP; it is closed at the end."""
    service = Service(KeyRing({owner: [hash_of(key)] for owner, key in KEYS.items()}), limits)
    if ready:
        service.ready(engine)
    server = make_server(service, address)
    with address.listen(limits.connections) as door, running(server, service, door, grace):
        yield Served(address.url(door), service)


def openai_of(server: Served, owner: str = "clinic") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS.get(owner, owner), max_retries=0)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def told(error: openai.APIStatusError) -> tuple[int, Any]:
    return error.status_code, error.body["code"]  # type: ignore[index]


def numbers(server: Served) -> dict[tuple[str, str, str], float]:
    """Every sample of /metrics by name, model and status or kind."""
    answer = httpx.get(f"{server.url}/metrics", headers=bearer(KEYS[OPERATOR]))
    assert answer.status_code == 200
    samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    return {
        (s.name, s.labels.get("model", ""), s.labels.get("status") or s.labels.get("kind", "")): s.value
        for s in samples
        if "le" not in s.labels
    }


def counted(server: Served, status: str, model: str = "clinic") -> float:
    return numbers(server).get(("flexperts_requests_total", model, status), 0)


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def self_signed(path: Path) -> Path:
    """Write a certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    day = timedelta(days=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - day)
        .not_valid_after(datetime.now(UTC) + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(made.public_bytes(Encoding.PEM) + secret)
    return path
