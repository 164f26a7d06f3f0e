"""What silos and the server both compute: a round's masks, checks of its secrets, and errors."""

from __future__ import annotations

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.fixed_point import FixedPoint, Ring
from flexperts.communication.secure.messages import Closed, Terms
from flexperts.errors import FederationError


def common_mask(
    private: bytes, public: str, terms: Terms, numbers: FixedPoint, pair: tuple[str, str], size: int
) -> Ring:
    """Return the mask of two silos; the first one in alphabetical order adds it, the other one subtracts it.

    Args:
        private: The private key of one.
        public: The public key of the other, in hex.
        terms: The round.
        numbers: Its whole numbers.
        pair: The names of both.
        size: Number of values.
    """
    try:
        key = ciphers.agreed(private, bytes.fromhex(public), "mask", terms.digest, repr(numbers), *sorted(pair))
    except ValueError:
        raise refused(f"the keys of {pair[1]}", "they are not keys of X25519") from None
    return ciphers.keystream(key, size, numbers.dtype)


def own_mask(secret: bytes, terms: Terms, numbers: FixedPoint, size: int) -> Ring:
    """Return the mask that a silo's secret gives."""
    return ciphers.keystream(ciphers.derived(secret, "own mask", terms.digest), size, numbers.dtype)


def check_of(secret: bytes) -> str:
    """Return the value by which a secret is recognized; its masks are another derived key."""
    return ciphers.derived(secret, "check").hex()


def closing(terms: Terms, closed: Closed) -> tuple[str, ...]:
    """Return what silos sign of a round's survivors."""
    return ("survivors", terms.digest, *closed.survivors, "", *closed.dropped)


def fingerprint(identity: str) -> str:
    """Return an identity in the form in which people compare it."""
    return " ".join(identity[at : at + 4] for at in range(0, 32, 4))


class SpoiltError(Exception):
    """A sum that cannot be used or made again: the round changes nothing, and the run goes on."""


def too_few(found: int, least: int) -> FederationError:
    """Return the error for a round that too few silos are left in."""
    return FederationError(
        f"secure aggregation: {found} silos are left in the round",
        f"the sum of fewer than {least} is not made",
        "resume the run when more silos are up",
    )


def refused(value: str, rule: str, remedy: str = "") -> FederationError:
    """Return the error for a message that breaks the protocol."""
    remedy = remedy or "resume the run, which begins the round again with new keys"
    return FederationError(f"secure aggregation: {value}", rule, remedy)
