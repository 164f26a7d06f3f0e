"""A client's part of secure aggregation in a run: its keys on disk, and its answers to the server's requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from flexperts.communication.compression import Packed
from flexperts.communication.messages import MASKED
from flexperts.communication.secure import ciphers
from flexperts.communication.secure.masks import fingerprint
from flexperts.communication.secure.messages import AnyMessage, Closed, Masking, SetUp, Unmask, read
from flexperts.communication.secure.silo import Silo, State
from flexperts.config.federation import PrivacyConfig
from flexperts.errors import PrivacyError, one_line
from flexperts.files import damaged, opened, read_json, sealed, write_json
from flexperts.observer import Observer
from flexperts.parameters.vector import Vector
from flexperts.protection.secure import rules_of

_SERVER = "server"


@dataclass(frozen=True)
class Standing:
    """What a silo has besides a run: who it is, and whom it knows.

    Args:
        identity: File of its identity; by default one among the run's files.
        roster: Silo -> its identity, if only these are accepted; else silos are known as they are first seen.
    """

    identity: Path | None = None
    roster: Mapping[str, str] = field(default_factory=dict)


class Masked:
    """The secrets of one client, in one file; what is answered is on disk before it is returned.

    Args:
        name: The client.
        folder: The folder of its files in this run.
        privacy: The recipe's section.
        standing: Who the client is.
        say: Receives the identities of new silos, where this one has an identity of its own and no roster.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        privacy: PrivacyConfig,
        standing: Standing | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._path = folder / "secure" / f"{name}.json"
        self._standing = standing or Standing()
        self._identity = self._standing.identity or folder / "secure" / f"{name}.identity.json"
        self._name, self._privacy, self._say = name, privacy, say or Observer().notice

    def card(self, run: str) -> str:
        """Return what the client joins with, as JSON."""
        with self._silo() as silo:
            return silo.card(run).model_dump_json()

    def keys(self, setup: str) -> str:
        """Return the answer to a request for keys; both are JSON."""
        with self._silo() as silo:
            known = set(silo.state.pins)
            answer = silo.advertise(_read(SetUp, setup))
            if self._standing.identity is not None and not self._standing.roster:
                for name in sorted(silo.state.pins.keys() - known - {self._name}):
                    told = f"silo {one_line(name)} is new, its identity is {fingerprint(silo.state.pins[name])}"
                    self._say(f"{told}: compare it with what that silo's `flexperts silo check` prints")
            return answer.model_dump_json()

    def signature(self, closed: str) -> str:
        """Return the answer to a list of survivors; both are JSON."""
        with self._silo() as silo:
            return silo.agree(_read(Closed, closed)).model_dump_json()

    def is_new(self, masking: str) -> bool:
        """Return whether no update has been masked for a request yet."""
        told = _read(Masking, masking)
        with self._silo() as silo:
            session = silo.state.sessions.get(told.session)
            return session is None or session.told != told

    def update(self, masking: str, number: int, change: Vector | None, rows: int) -> Packed:
        """Return an update, masked, in the place of the bare one.

        Args:
            masking: The request's keys of others, as JSON.
            number: The round that the update is of.
            change: The update, clipped.
            rows: The client's rows.

        Raises:
            PrivacyError: There is no such part in the request.
        """
        if not masking or change is None:
            raise PrivacyError(
                f"a request to {self._name} for an update without masks",
                "with privacy.aggregation = 'secure' none is sent",
                "use one flexperts version on the server and every silo",
            )
        with self._silo() as silo:
            return Packed({MASKED: silo.masked(_read(Masking, masking), number, change, rows)}, {"packing": MASKED})

    def shares(self, unmask: str) -> str:
        """Return the answer to a request for shares; both are JSON."""
        with self._silo() as silo:
            return silo.reveal(_read(Unmask, unmask)).model_dump_json()

    @contextmanager
    def _silo(self) -> Iterator[Silo]:
        """Yield the client's part of the protocol, and write what it must keep."""
        try:
            state = State.model_validate(_loaded(self._path)) if self._path.exists() else State()
        except ValidationError as error:
            raise damaged(self._path, f"its content is not valid: {error.errors()[0]['loc']}") from error
        yield Silo(self._name, identity_of(self._identity), state, rules_of(self._privacy), self._standing.roster)
        write_json(self._path, sealed(state.model_dump()), indent=None)


def identity_of(path: Path) -> bytes:
    """Return the Ed25519 private key in a file, which is made on first use."""
    if not path.exists():
        write_json(path, sealed({"key": ciphers.new_secret().hex()}))
    try:
        key = bytes.fromhex(str(_loaded(path)["key"]))
    except (KeyError, ValueError) as error:
        raise damaged(path, "it has no key") from error
    return key


def _loaded(path: Path) -> dict[str, object]:
    return opened(path, read_json(path), needed=True)


def _read(kind: type[AnyMessage], text: str) -> AnyMessage:
    return read(kind, text, _SERVER)
