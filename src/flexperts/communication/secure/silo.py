"""A silo's part of secure aggregation: its keys, its masks, and what it reveals of others.

Source: Bonawitz et al., CCS 2017 (ePrint 2017/281), figure 4. The server's part is ``tally.py``; neither imports
the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.fixed_point import Ring
from flexperts.communication.secure.graph import degree, holder_share, threshold_of
from flexperts.communication.secure.masks import (
    check_of,
    closing,
    common_mask,
    fingerprint,
    own_mask,
    refused,
    too_few,
)
from flexperts.communication.secure.messages import (
    Advertised,
    Agreed,
    Card,
    Closed,
    Key,
    Masking,
    Revealed,
    Rules,
    SetUp,
    Terms,
    Unmask,
)

_BY_PHONE = (
    "compare identities with that silo by phone, then correct the roster in this silo's file or start a new run"
)


class Session(BaseModel):
    """A silo's secrets of one round."""

    model_config = ConfigDict(extra="forbid")

    setup: SetUp
    answer: Advertised
    key: Key
    """Private key of the masks with others."""
    secret: Key
    """What the silo's own mask comes from."""
    shares: tuple[Key, Key]
    """Its own shares of its secret and its key."""
    told: Masking | None = None
    digest: str = ""
    """Of the masked update, which is made once."""
    closed: Closed | None = None


class State(BaseModel):
    """What a silo keeps of a run; it must be on disk before an answer leaves."""

    model_config = ConfigDict(extra="forbid")

    sealing: Key = Field(default_factory=lambda: ciphers.new_secret().hex())
    """Private key to which others encrypt their shares."""
    pins: dict[str, Key] = Field(default_factory=dict)
    """Silo -> the identity under which it was first seen."""
    sessions: dict[str, Session] = Field(default_factory=dict)
    past: list[str] = Field(default_factory=list)
    """Sessions whose secrets are deleted."""
    summed: int = 0
    """The last round for which it has given shares: the sum of other survivors would differ by single updates."""


class Silo:
    """One silo in one run.

    Args:
        name: Its name.
        identity: Its Ed25519 private key.
        state: What it has kept; the methods change it.
        rules: What the recipe says.
        roster: Silo -> its identity, for silos that are known by other means; others are taken as first seen.
    """

    def __init__(
        self,
        name: str,
        identity: bytes,
        state: State,
        rules: Rules,
        roster: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.identity, self.state, self.rules = name, identity, state, rules
        self.roster = roster or {}

    def card(self, run: str) -> Card:
        """Return what the silo joins with."""
        sealing = ciphers.public_key(bytes.fromhex(self.state.sealing)).hex()
        return Card(
            identity=ciphers.identity_key(self.identity).hex(),
            sealing=sealing,
            signature=ciphers.signed(self.identity, "card", run, self.name, sealing).hex(),
        )

    def advertise(self, asked: SetUp) -> Advertised:
        """Return keys and encrypted shares for a round, or refuse its silos or its terms."""
        terms, session = asked.terms, asked.terms.session
        if session in self.state.sessions and self.state.sessions[session].setup == asked:
            return self.state.sessions[session].answer
        if session in self.state.sessions or session in self.state.past:
            raise refused(f"session {session[:8]}", "a session is set up once")
        if terms.round <= self.state.summed:
            raise refused(
                f"keys for another sum of round {terms.round}",
                "this silo has given its shares for one, and two sums can differ by the update of one silo",
                "start a new run, if the run's directory does not have the sum any more",
            )
        self._check_terms(asked)
        self._check_cards(terms.run, asked.peers)
        key, secret, names = ciphers.new_secret(), ciphers.new_secret(), sorted(asked.peers)
        of_secret, of_key = (ciphers.shares_of(each, terms.threshold, len(names)) for each in (secret, key))
        shares = dict(zip(names, zip(of_secret, of_key, strict=True), strict=True))
        sealed = {
            name: ciphers.seal(
                self._sealing_key(asked, name), b"".join(shares[name]), terms.digest, self.name, name
            ).hex()
            for name in names
            if name != self.name
        }
        mask, check = ciphers.public_key(key).hex(), check_of(secret)
        signature = ciphers.signed(self.identity, "keys", terms.digest, self.name, mask, check).hex()
        answer = Advertised(mask=mask, check=check, sealed=sealed, signature=signature)
        own = shares[self.name]
        self._forget_before(terms)
        self.state.sessions[session] = Session(
            setup=asked, answer=answer, key=key.hex(), secret=secret.hex(), shares=(own[0].hex(), own[1].hex())
        )
        return answer

    def masked(self, told: Masking, number: int, change: NDArray[np.float32], rows: int) -> Ring:
        """Return the silo's update, masked.

        Args:
            told: The others' keys and shares.
            number: The round that the update is of.
            change: The update, clipped.
            rows: The silo's rows; its weight is their share of those of the silo with most.
        """
        session = self._session(told.session)
        terms, setup = session.setup.terms, session.setup
        if terms.round != number:
            raise refused(f"a session of round {terms.round} for an update of round {number}", "it is of one round")
        if other := sorted(told.peers.keys() - (setup.peers.keys() - {self.name})):
            raise refused(f"silos {', '.join(other[:3])}", "no shares were sent to them in this session")
        if len(told.peers) + 1 < terms.threshold:
            raise too_few(len(told.peers) + 1, terms.threshold)
        masks = [peer.mask for peer in told.peers.values()] + [session.answer.mask]
        if len(set(masks)) < len(masks):
            raise refused("two silos with one key", "every silo has its own")
        for name, peer in told.peers.items():
            identity = bytes.fromhex(setup.peers[name].identity)
            text = ("keys", terms.digest, name, peer.mask, peer.check)
            if not ciphers.is_signed(identity, bytes.fromhex(peer.signature), *text):
                raise refused(f"the keys of {name}", "its identity has not signed them for this session")
            if self._shares_from(setup, name, told) is None:
                raise refused(f"the shares of {name}", "they were not sealed by it, for this silo and this session")
        numbers = self.rules.numbers(terms.clients)
        masked = numbers.encode(change, min(rows, terms.most) / terms.most)
        digest = hashlib.sha256(told.model_dump_json().encode() + masked.tobytes()).hexdigest()
        if session.digest not in ("", digest):
            raise refused(f"session {told.session[:8]}", "one update is masked in a session, once")
        for name, peer in told.peers.items():
            private, pair = bytes.fromhex(session.key), (self.name, name)
            common = common_mask(private, peer.mask, terms, numbers, pair, masked.size)
            (np.add if self.name < name else np.subtract)(masked, common, out=masked)
        masked += own_mask(bytes.fromhex(session.secret), terms, numbers, masked.size)
        session.told, session.digest = told, digest
        return masked

    def agree(self, closed: Closed) -> Agreed:
        """Return a signature of the survivors; in a session there is one list."""
        session = self._acceptable(closed)
        self._fix(session, closed)
        return Agreed(signature=ciphers.signed(self.identity, *closing(session.setup.terms, closed)).hex())

    def reveal(self, asked: Unmask) -> Revealed:
        """Return the silo's shares: of every survivor's secret, of every other silo's key, and never both."""
        session = self._acceptable(asked.closed)
        setup, own = session.setup, session.shares
        if self.rules.agrees:
            self._check_agreement(setup, asked)
        self._fix(session, asked.closed)
        assert session.told is not None
        secrets = {self.name: own[0]}
        keys: dict[str, str] = {}
        for name in session.told.peers:
            of_secret, of_key = self._shares_from(setup, name, session.told) or (b"", b"")
            if name in asked.closed.survivors:
                secrets[name] = of_secret.hex()
            else:
                keys[name] = of_key.hex()
        return Revealed(secrets=secrets, keys=keys)

    def _check_terms(self, asked: SetUp) -> None:
        """Refuse terms that do not follow from the recipe and the number of silos."""
        terms, found = asked.terms, len(asked.peers)
        among = holder_share(terms.clients, self.rules.share)
        wanted = 1 + degree(terms.clients, among)
        if found != wanted:
            raise refused(f"{found} share holders", f"of {terms.clients} silos it is {wanted}")
        if terms.threshold != threshold_of(found, among):
            rule = f"of {found} share holders it is {threshold_of(found, among)}, by privacy.survivors"
            raise refused(f"a threshold of {terms.threshold}", rule)
        if self.rules.agrees and found != terms.clients:
            raise refused(f"{found} share holders of {terms.clients} silos", "with privacy.agreement it is all")

    def _check_cards(self, run: str, peers: Mapping[str, Card]) -> None:
        """Refuse cards that are not their silos' own, and pin the identities of silos that are new."""
        if peers.get(self.name) != self.card(run):
            raise refused(f"the keys of {self.name}", "another silo's are in their place")
        for kind in ("identity", "sealing"):
            if len({getattr(card, kind) for card in peers.values()}) < len(peers):
                raise refused("two silos with one key", "every silo has its own")
        for name, card in peers.items():
            text = ("card", run, name, card.sealing)
            if not ciphers.is_signed(bytes.fromhex(card.identity), bytes.fromhex(card.signature), *text):
                raise refused(f"the keys of {name}", "its identity has not signed them for this run")
            if self.roster and name != self.name and name not in self.roster:
                raise refused(f"silo {name}", "it is not in this silo's roster", _BY_PHONE)
            known = self.roster.get(name, self.state.pins.get(name, card.identity))
            if card.identity != known:
                raise refused(
                    f"the identity {fingerprint(card.identity)} of {name}",
                    f"this silo knows {fingerprint(known)}",
                    _BY_PHONE,
                )
        self.state.pins |= {name: card.identity for name, card in peers.items()}

    def _session(self, session: str) -> Session:
        if session not in self.state.sessions:
            raise refused(f"session {session[:8]}", "this silo has not set it up, or has ended it")
        return self.state.sessions[session]

    def _sealing_key(self, setup: SetUp, name: str) -> bytes:
        """Return the key for shares between this silo and another one."""
        pair = sorted((self.name, name))
        private, public = bytes.fromhex(self.state.sealing), bytes.fromhex(setup.peers[name].sealing)
        try:
            return ciphers.agreed(private, public, "shares", setup.terms.digest, *pair)
        except ValueError:
            raise refused(f"the keys of {name}", "they are not keys of X25519") from None

    def _shares_from(self, setup: SetUp, name: str, told: Masking) -> tuple[bytes, bytes] | None:
        key, sealed = self._sealing_key(setup, name), bytes.fromhex(told.peers[name].sealed)
        both = ciphers.opened(key, sealed, setup.terms.digest, name, self.name)
        return None if both is None else (both[: ciphers.SIZE], both[ciphers.SIZE :])

    def _acceptable(self, closed: Closed) -> Session:
        """Return the session of a list of survivors; refuse a list that cannot be right, or is another one."""
        session = self._session(closed.session)
        if session.told is None:
            raise refused(f"session {closed.session[:8]}", "this silo has sent no update in it")
        survivors, dropped, all_of = set(closed.survivors), set(closed.dropped), {self.name, *session.told.peers}
        if both := sorted(survivors & dropped):
            raise refused(f"both kinds of shares of {both[0]}", "a silo gives one kind for each other silo")
        if survivors | dropped != all_of or self.name not in survivors:
            raise refused("a list of survivors", "it names this silo and every silo of the session, and no other")
        if len(survivors) < session.setup.terms.threshold:
            raise too_few(len(survivors), session.setup.terms.threshold)
        if session.closed not in (None, closed):
            raise refused(f"another list of survivors in session {closed.session[:8]}", "in a session there is one")
        return session

    def _fix(self, session: Session, closed: Closed) -> None:
        session.closed, self.state.summed = closed, max(self.state.summed, session.setup.terms.round)

    def _check_agreement(self, setup: SetUp, asked: Unmask) -> None:
        text = closing(setup.terms, asked.closed)
        right = [
            name
            for name, signature in asked.signatures.items()
            if name in asked.closed.survivors
            and ciphers.is_signed(bytes.fromhex(setup.peers[name].identity), bytes.fromhex(signature), *text)
        ]
        if len(right) < setup.terms.threshold:
            raise refused(
                f"{len(right)} signatures of the survivors", f"{setup.terms.threshold} must have signed one list"
            )

    def _forget_before(self, terms: Terms) -> None:
        """Delete the secrets of sessions that are over: all but those of the round before, and of other rounds."""
        for session, kept in list(self.state.sessions.items()):
            if kept.setup.terms.round != terms.round - 1:
                self.state.past.append(session)
                del self.state.sessions[session]
