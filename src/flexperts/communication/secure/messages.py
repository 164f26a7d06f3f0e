"""The messages of secure aggregation, in the order in which they are sent; each is JSON in one text field.

A silo joins with its ``Card``. A round then is: ``SetUp`` and ``Advertised`` (with the unmasking of the round
before, or alone), ``Masking`` with the request to train, ``Unmask`` and ``Revealed``; where silos do not trust the
server to tell all of them the same survivors, ``Closed`` and ``Agreed`` come before ``Unmask``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexperts.communication.secure.fixed_point import FixedPoint
from flexperts.communication.secure.graph import FEWEST, threshold_of
from flexperts.errors import incompatible

_LONGEST_NAME = 400
_MOST = 2**31
_MOST_CLIENTS = 100_000


def _hex(size: int) -> Any:
    return Field(pattern=f"^[0-9a-f]{{{2 * size}}}$")


Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
Session = Annotated[str, _hex(16)]
Key = Annotated[str, _hex(32)]
Share = Key
SEALED = 12 + 2 * 32 + 16
"""Bytes of a nonce, two encrypted shares, and a tag."""
Sealed = Annotated[str, _hex(SEALED)]
Signature = Annotated[str, _hex(64)]
Names = Annotated[list[Name], Field(max_length=_MOST)]


class Message(BaseModel):
    """Base of all messages: no other fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyMessage = TypeVar("AnyMessage", bound=Message)


class Rules(Message):
    """What the recipe says, which silos and server have each by themselves.

    Args:
        clip: The L2 norm that updates are clipped to.
        share: More than this share of the silos must stay to the end.
        multiplier: Standard deviation of the noise on the sum, over ``clip``, when as few as possible have stayed.
        agrees: Whether survivors sign one list before they give shares.
    """

    clip: float
    share: float = 0.5
    multiplier: float = 0.0
    agrees: bool = False

    def numbers(self, clients: int) -> FixedPoint:
        """Return the whole numbers of a round with so many silos."""
        return FixedPoint(
            self.clip, clients, self.multiplier * self.clip / threshold_of(clients, self.share) ** 0.5
        )


class Card(Message):
    """What a silo tells the others of itself when it joins.

    Args:
        identity: Its Ed25519 public key.
        sealing: Its X25519 public key for this run, to which its shares are encrypted.
        signature: By the identity, of run, name and ``sealing``.
    """

    identity: Key
    sealing: Key
    signature: Signature


class Terms(Message):
    """What all silos of a round must be told alike; every key of the round is derived from it.

    Args:
        run: The run's id.
        round: The round, from 1.
        session: A random number: a round that is begun again is another session.
        clients: Clients of the round.
        threshold: How many of a secret's holders must answer.
        most: Rows of the silo that counts most; the weight of others is their rows over it.
    """

    run: Annotated[str, Field(max_length=200)]
    round: Annotated[int, Field(ge=1, le=_MOST)]
    session: Session
    clients: Annotated[int, Field(ge=FEWEST, le=_MOST_CLIENTS)]
    threshold: Annotated[int, Field(ge=FEWEST, le=_MOST)]
    most: Annotated[int, Field(ge=1, le=_MOST)]

    @property
    def digest(self) -> str:
        """What stands for these terms and no others."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class SetUp(Message):
    """A request for the keys of a round.

    Args:
        terms: The terms.
        peers: Name -> card, sorted by name, of the silos that will hold a share, the asked one among them.
    """

    terms: Terms
    peers: dict[Name, Card]


class Advertised(Message):
    """A silo's keys and shares for a round.

    Args:
        mask: X25519 public key of its masks with others.
        check: A value by which its secret is recognized; it says nothing of the masks.
        sealed: Holder -> its shares of the silo's secret and of its masks' private key, encrypted to it.
        signature: By the identity, of terms, name, ``mask`` and ``check``.
    """

    mask: Key
    check: Key
    sealed: dict[Name, Sealed]
    signature: Signature


class Told(Message):
    """What one silo receives of another one's ``Advertised``."""

    mask: Key
    check: Key
    sealed: Sealed
    signature: Signature


class Masking(Message):
    """A request to mask an update.

    Args:
        session: The round's session.
        peers: Name -> its keys and shares, for the other holders that have sent some.
    """

    session: Session
    peers: dict[Name, Told]


class Closed(Message):
    """Whose masked updates have arrived, among the holders of the silo's shares.

    Args:
        session: The round's session.
        survivors, dropped: Names, sorted; together they are those of ``Masking``, and the silo itself.
    """

    session: Session
    survivors: Names
    dropped: Names


class Agreed(Message):
    """A silo's signature of terms and survivors."""

    signature: Signature


class Unmask(Message):
    """A request for shares.

    Args:
        closed: Whose updates have arrived.
        signatures: Survivor -> what it has answered to the same ``closed``; empty where silos trust the server.
    """

    closed: Closed
    signatures: dict[Name, Signature] = Field(default_factory=dict)


class Revealed(Message):
    """Shares of the survivors' secrets, and of the private keys of those that have dropped out; by name."""

    secrets: dict[Name, Share]
    keys: dict[Name, Share]


def read(kind: type[AnyMessage], text: str, sender: str) -> AnyMessage:
    """Return a message that another machine sent, or refuse it.

    Args:
        kind: Its type.
        text: JSON.
        sender: Who sent it, for errors.
    """
    try:
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}"
    except (ValueError, RecursionError):
        rule = "it is not JSON"
    raise incompatible(f"{sender}'s {kind.__name__} of secure aggregation", rule)
