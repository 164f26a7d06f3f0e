"""The server's part of secure aggregation: it passes keys and shares on, and makes the sum of a round.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), figure 4; with many silos, the neighbours of Bell et al., 2020.
The silos' part is ``silo.py``; neither imports the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.fixed_point import Ring
from flexperts.communication.secure.graph import holder_share, holders, threshold_of
from flexperts.communication.secure.masks import SpoiltError, check_of, common_mask, own_mask, refused, too_few
from flexperts.communication.secure.messages import (
    SEALED,
    Advertised,
    Agreed,
    Card,
    Closed,
    Masking,
    Message,
    Revealed,
    Rules,
    SetUp,
    Signature,
    Terms,
    Told,
    Unmask,
)
from flexperts.errors import FederationError


class Session(Message):
    """What is fixed when a session begins.

    Args:
        terms: The terms.
        rules: What the recipe says.
        least: Silos that must stay to the end.
        cards: Silo -> its card, sorted.
        rows: Silo -> the rows that it counts for.
        holders: Silo -> who holds its shares, sorted, itself among them.
    """

    terms: Terms
    rules: Rules
    least: int
    cards: dict[str, Card]
    rows: dict[str, int]
    holders: dict[str, list[str]]


class Kept(Message):
    """A session in which all updates have arrived; with their sum it can be unmasked later."""

    session: Session
    advertised: dict[str, Advertised]
    survivors: list[str]


def new_session(run: str, number: int, cards: Mapping[str, Card], rows: Mapping[str, int], rules: Rules) -> Session:
    """Return a new session.

    Args:
        run: The run's id.
        number: The round.
        cards: The round's silos with their cards, at least three.
        rows: Silo -> the rows that it counts for.
        rules: What the recipe says.
    """
    least = threshold_of(len(cards), rules.share)
    if len(cards) < least:
        raise too_few(len(cards), least)
    among = holder_share(len(cards), rules.share)
    of_each = holders(list(cards), among)
    terms = Terms(
        run=run,
        round=number,
        session=secrets.token_hex(16),
        clients=len(cards),
        threshold=threshold_of(min(map(len, of_each.values())), among),
        most=max(rows[name] for name in cards),
    )
    return Session(
        terms=terms,
        rules=rules,
        least=least,
        cards=dict(sorted(cards.items())),
        rows={name: rows[name] for name in sorted(cards)},
        holders=of_each,
    )


class Tally:
    """One session: a round's silos, what they have sent, and the sum so far.

    Args:
        session: The session.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.terms, self.least = session, session.terms, session.least
        self.cards, self.rows, self.holders = session.cards, session.rows, session.holders
        self.numbers = session.rules.numbers(session.terms.clients)
        self.survivors: list[str] = []
        self._advertised: dict[str, Advertised] = {}
        self._revealed: dict[str, Revealed] = {}
        self._sum: Ring | None = None

    @classmethod
    def of(cls, kept: Kept, masked: Ring) -> Tally:
        """Return a session that was kept, with the sum of its masked updates."""
        tally = cls(kept.session)
        tally.survivors, tally._advertised, tally._sum = list(kept.survivors), dict(kept.advertised), masked
        return tally

    def kept(self) -> tuple[Kept, Ring]:
        """Return the session and the sum of its masked updates, to be unmasked later."""
        if self._sum is None or len(self.survivors) < self.least:
            raise too_few(len(self.survivors), self.least)
        return Kept(session=self.session, advertised=self._advertised, survivors=self.survivors), self._sum

    def setup(self, name: str) -> SetUp:
        """Return the request for a silo's keys."""
        return SetUp(terms=self.terms, peers={peer: self.cards[peer] for peer in self.holders[name]})

    def advertise(self, name: str, sent: Advertised) -> None:
        """Take a silo's keys and shares, or refuse them."""
        wanted = set(self.holders[name]) - {name}
        if sent.sealed.keys() != wanted:
            raise refused(f"the shares of {name}", "they must be one for every other holder, and for no one else")
        if any(sent.mask == other.mask for peer, other in self._advertised.items() if peer != name):
            raise refused(f"the keys of {name}", "another silo has the same")
        self._advertised[name] = sent

    @property
    def ready(self) -> list[str]:
        """The silos that have sent keys, sorted: those whose updates can be in the sum."""
        return sorted(self._advertised)

    def check_ready(self) -> None:
        """Refuse to go on with the keys of too few silos."""
        if len(self._advertised) < self.least:
            raise too_few(len(self._advertised), self.least)

    def masking(self, name: str) -> Masking:
        """Return the request to mask a silo's update, after all keys have been taken."""
        self.check_ready()
        told = {
            peer: Told(mask=its.mask, check=its.check, sealed=its.sealed[name], signature=its.signature)
            for peer in self.holders[name]
            if peer != name and (its := self._advertised.get(peer)) is not None
        }
        return Masking(session=self.terms.session, peers=told)

    def add(self, name: str, masked: Ring) -> None:
        """Add a masked update, which is not kept."""
        if name not in self._advertised or name in self.survivors:
            raise refused(f"an update of {name}", "each silo that has sent keys sends one")
        if masked.dtype != self.numbers.dtype or (self._sum is not None and masked.shape != self._sum.shape):
            raise refused(
                f"an update of {name}", f"it must be {self.numbers.dtype} numbers, as many as others send"
            )
        if self._sum is None:
            self._sum = np.zeros_like(masked)
        self._sum += masked
        self.survivors = sorted([*self.survivors, name])

    def closed(self, name: str) -> Closed:
        """Return whose updates have arrived among a survivor's holders; fewer than ``least`` end the round."""
        if len(self.survivors) < self.least:
            raise too_few(len(self.survivors), self.least)
        seen = [peer for peer in self.holders[name] if peer in self._advertised]
        return Closed(
            session=self.terms.session,
            survivors=[peer for peer in seen if peer in self.survivors],
            dropped=[peer for peer in seen if peer not in self.survivors],
        )

    def unmask(self, name: str, signatures: Mapping[str, Signature] | None = None) -> Unmask:
        """Return the request for a survivor's shares.

        Args:
            name: The survivor.
            signatures: What survivors have answered to ``closed``, where silos ask for it.
        """
        return Unmask(closed=self.closed(name), signatures=dict(signatures or {}))

    def reveal(self, name: str, sent: Revealed) -> None:
        """Take a survivor's shares, or refuse them."""
        if name not in self.survivors:
            raise refused(f"shares of {name}", "only survivors give shares")
        closed = self.closed(name)
        if sorted(sent.secrets) != closed.survivors or sorted(sent.keys) != closed.dropped:
            raise refused(f"the shares of {name}", "they must be those that it was asked for")
        self._revealed[name] = sent

    def total(self) -> tuple[Ring, dict[str, str]]:
        """Return the sum of the survivors' updates, and silo -> what is wrong with its shares, if anything is.

        Raises:
            SpoiltError: A silo's masks cannot be computed from the shares, of which some are wrong.
            FederationError: Too few have given shares so far.
        """
        assert self._sum is not None
        total, faults = self._sum.copy(), dict[str, str]()
        for name in self.survivors:
            is_right = partial(_is_secret, self._advertised[name].check)
            given = {peer: its.secrets[name] for peer, its in self._revealed.items() if name in its.secrets}
            secret = self._rebuilt(name, given, is_right, faults)
            total -= own_mask(secret, self.terms, self.numbers, total.size)
        for name in sorted(self._advertised.keys() - set(self.survivors)):
            remaining = [peer for peer in self.holders[name] if peer in self.survivors]
            is_right = partial(_is_key, self._advertised[name].mask)
            given = {peer: its.keys[name] for peer, its in self._revealed.items() if name in its.keys}
            key = self._rebuilt(name, given, is_right, faults) if remaining else b""
            for peer in remaining:
                pair = (name, peer)
                common = common_mask(key, self._advertised[peer].mask, self.terms, self.numbers, pair, total.size)
                (np.subtract if peer < name else np.add)(total, common, out=total)
        return total, faults

    @property
    def counted(self) -> int:
        """The survivors' rows."""
        return sum(self.rows[name] for name in self.survivors)

    @property
    def weight(self) -> float:
        """The sum of the survivors' weights, by which the sum is divided."""
        return self.counted / self.terms.most

    def _rebuilt(
        self, name: str, given: Mapping[str, str], is_right: Callable[[bytes], bool], faults: dict[str, str]
    ) -> bytes:
        """Return a silo's secret or key from the shares of its holders."""
        if len(given) < self.terms.threshold:
            raise too_few(len(given), self.terms.threshold)
        numbers = {peer: self.holders[name].index(peer) + 1 for peer in given}
        shares = {numbers[peer]: bytes.fromhex(share) for peer, share in given.items()}
        secret, wrong = ciphers.secret_among(shares, self.terms.threshold, is_right)
        if secret is None:
            raise SpoiltError(
                FederationError(
                    f"secure aggregation: the shares of {name}",
                    f"they do not give its secret: {name} has dealt wrong ones, or one of "
                    f"{_listed(given)} has sent one",
                    "look at these silos' logs, and leave out one that you do not trust",
                )
            )
        for peer in (peer for peer, number in numbers.items() if number in wrong):
            faults.setdefault(peer, f"it has sent a wrong share of {name}, or got one from it")
        return secret


def message_bytes(names: Sequence[str], share: float, *, agreement: bool) -> dict[str, tuple[int, int]]:
    """Return client -> bytes that it sends and receives in a round without drop-outs, without the masked update.

    They are those of the messages themselves, of clients that do not exist.

    Args:
        names: The round's clients.
        share: ``privacy.survivors``.
        agreement: ``privacy.agreement``.
    """
    key, signature, sealed = ("0" * 2 * size for size in (ciphers.SIZE, 2 * ciphers.SIZE, SEALED))
    cards = dict.fromkeys(names, Card(identity=key, sealing=key, signature=signature))
    tally = Tally(new_session("0" * 32, 1, cards, dict.fromkeys(names, 1), Rules(clip=1.0, share=share)))
    keys: dict[str, Advertised] = {}
    for number, name in enumerate(tally.cards):
        dealt = {peer: sealed for peer in tally.holders[name] if peer != name}
        keys[name] = Advertised(mask=f"{number:064x}", check=key, sealed=dealt, signature=signature)
        tally.advertise(name, keys[name])
    tally.survivors = list(tally.cards)
    signed, signatures = ([Agreed(signature=signature)], dict.fromkeys(names, signature)) if agreement else ([], {})
    return {
        name: (
            _bytes(its, *signed, Revealed(secrets=dict.fromkeys(tally.holders[name], key), keys={})),
            _bytes(
                tally.setup(name),
                tally.masking(name),
                *([tally.closed(name)] if agreement else []),
                tally.unmask(name, signatures),
            ),
        )
        for name, its in keys.items()
    }


def _bytes(*messages: Message) -> int:
    return sum(len(message.model_dump_json()) for message in messages)


def _is_secret(check: str, secret: bytes) -> bool:
    return check_of(secret) == check


def _is_key(public: str, private: bytes) -> bool:
    return ciphers.public_key(private).hex() == public


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
