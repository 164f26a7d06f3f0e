"""What a silo or the server of secure aggregation refuses, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.masks import SpoiltError, fingerprint
from flexperts.communication.secure.messages import (
    Advertised,
    Card,
    Masking,
    Message,
    Revealed,
    Rules,
    SetUp,
    Unmask,
    read,
)
from flexperts.communication.secure.silo import Silo, State
from flexperts.communication.secure.tally import Kept, Tally
from flexperts.errors import FederationError

from .rounds import CLIP, Round, silo

Change = Callable[[SetUp], SetUp]


def with_(message: Any, **changes: Any) -> Any:
    return message.model_copy(update=changes)


def peers(setup: SetUp, **cards: Card) -> SetUp:
    return with_(setup, peers={**setup.peers, **cards})


def terms(setup: SetUp, **changes: Any) -> SetUp:
    return with_(setup, terms=with_(setup.terms, **changes))


STRANGER = silo("s02").card("run")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda s: peers(s, s00=STRANGER), "another silo's are in their place"),
        (lambda s: peers(s, s01=s.peers["s02"]), "two silos with one key: every silo has its own"),
        (
            lambda s: peers(s, s01=with_(STRANGER, identity=s.peers["s01"].identity)),
            "has not signed them for this run",
        ),
        (lambda s: terms(s, run="other"), "another silo's are in their place"),
        (lambda s: terms(s, threshold=4), "of 4 share holders it is 3, by privacy.survivors"),
        (lambda s: terms(s, clients=3), "4 share holders: of 3 silos it is 3"),
        (lambda s: terms(s, clients=1000), "4 share holders: of 1000 silos it is 1"),
        (
            lambda s: with_(s, peers={n: c for n, c in s.peers.items() if n != "s00"}),
            "3 share holders: of 4 silos it",
        ),
    ],
)
def test_a_setup_is_refused(change: Change, rule: str) -> None:
    one = Round(4)
    with pytest.raises(FederationError, match=rule):
        one.silos["s00"].advertise(change(one.tally.setup("s00")))
    assert one.silos["s00"].state.sessions == {}


def test_a_threshold_of_half_is_refused() -> None:
    one = Round(6)
    with pytest.raises(FederationError, match="a threshold of 3: of 6 share holders it is 4"):
        one.silos["s00"].advertise(terms(one.tally.setup("s00"), threshold=3))


def test_swapped_keys_are_refused_by_the_name_of_their_silo() -> None:
    """A server gives its own keys, signed by an identity of its own: the silo has seen another one."""
    one = Round(4).advertise()
    two = Round(4, number=2, silos=one.silos)
    forged = silo("s02").card("run")
    with pytest.raises(FederationError, match=rf"{fingerprint(forged.identity)} of s02: this silo knows"):
        one.silos["s00"].advertise(peers(two.tally.setup("s00"), s02=forged))


def test_a_roster_admits_no_one_else() -> None:
    one = Round(4)
    known = {name: one.silos[name].card("run").identity for name in ("s01", "s02")}
    careful = Silo("s00", ciphers.new_secret(), State(), Rules(clip=CLIP), roster=known)
    setup = peers(one.tally.setup("s00"), s00=careful.card("run"))
    with pytest.raises(FederationError, match="silo s03: it is not in this silo's roster"):
        careful.advertise(setup)
    with pytest.raises(FederationError, match="of s01: this silo knows"):
        careful.advertise(peers(setup, s01=silo("s01").card("run")))


def test_a_session_is_set_up_once_and_a_repeated_request_has_one_answer() -> None:
    one = Round(4)
    setup, first = one.tally.setup("s00"), one.silos["s00"]
    assert first.advertise(setup) == first.advertise(setup)
    with pytest.raises(FederationError, match="a session is set up once"):
        first.advertise(terms(setup, most=1))
    for number in (2, 3):
        first.advertise(Round(4, number=number, silos=one.silos).tally.setup("s00"))
    assert setup.terms.session not in first.state.sessions  # its secrets are deleted
    with pytest.raises(FederationError, match="a session is set up once"):
        first.advertise(setup)


def masking(one: Round, **told: Any) -> Masking:
    asked = one.tally.masking("s00")
    changed = {name: with_(its, **told) for name, its in asked.peers.items() if name == "s01"}
    return Masking(session=asked.session, peers={**asked.peers, **changed})


def test_keys_and_shares_of_others_must_be_theirs_and_of_this_session() -> None:
    one = Round(4).advertise()
    again = Round(4, silos=one.silos)
    old = one.tally.masking("s00").peers["s01"]
    again.advertise()
    with pytest.raises(FederationError, match="the keys of s01: its identity has not signed them for this session"):
        again.masked("s00", masking(again, mask=old.mask))
    with pytest.raises(FederationError, match="the shares of s01: they were not sealed by it"):
        again.masked("s00", masking(again, sealed=old.sealed))
    with pytest.raises(FederationError, match="has not set it up, or has ended it"):
        again.masked("s00", one.tally.masking("s00"))
    meant_for_another = again.tally.masking("s02").peers["s01"].sealed
    with pytest.raises(FederationError, match="the shares of s01: they were not sealed by it"):
        again.masked("s00", masking(again, sealed=meant_for_another))
    with pytest.raises(FederationError, match="two silos with one key"):
        again.masked("s00", masking(again, mask=again.tally.masking("s00").peers["s02"].mask))


def test_too_few_silos_are_refused_by_silo_and_server() -> None:
    one = Round(4).advertise()
    told = one.tally.masking("s00")
    two = Masking(session=told.session, peers={"s01": told.peers["s01"]})
    with pytest.raises(FederationError, match="2 silos are left in the round: the sum of fewer than 3"):
        one.masked("s00", two)
    with pytest.raises(FederationError, match="2 silos are left in the round"):
        one.mask(["s02", "s03"]).tally.unmask("s00")
    with pytest.raises(FederationError, match="2 silos are left in the round"):
        Round(2)


def test_one_update_is_masked_once_in_a_session() -> None:
    """The difference of two updates under the same masks would be in the clear."""
    one = Round(4).advertise()
    first = one.masked("s00")
    assert one.masked("s00").tobytes() == first.tobytes()
    one.changes["s00"] = one.changes["s01"]
    with pytest.raises(FederationError, match="one update is masked in a session, once"):
        one.masked("s00")


def test_a_session_masks_an_update_of_its_own_round() -> None:
    """Else one round's update could be in two sums, as an update of two rounds."""
    one = Round(4, number=2).advertise()
    with pytest.raises(FederationError, match="a session of round 2 for an update of round 1: it is of one round"):
        one.silos["s00"].masked(one.tally.masking("s00"), 1, one.changes["s00"], 3)


def unmask(one: Round, survivors: str, dropped: str = "") -> Unmask:
    closed = one.tally.closed("s00")
    return Unmask(closed=with_(closed, survivors=survivors.split(), dropped=dropped.split()))


def test_a_silo_never_gives_both_kinds_of_shares_of_one_silo() -> None:
    one = Round(4).advertise().mask()
    asked, first = unmask(one, "s00 s01 s02", "s03"), one.silos["s00"]
    with pytest.raises(FederationError, match="both kinds of shares of s03"):
        first.reveal(unmask(one, "s00 s01 s02 s03", "s03"))
    revealed = first.reveal(asked)
    assert sorted(revealed.secrets) == ["s00", "s01", "s02"]
    assert sorted(revealed.keys) == ["s03"]
    assert first.reveal(asked) == revealed
    with pytest.raises(FederationError, match="another list of survivors in session"):
        first.reveal(one.tally.unmask("s00"))


def test_a_round_is_summed_once() -> None:
    """The sums of two sessions with other survivors would differ by the update of one silo."""
    one = Round(4).advertise().mask().reveal()
    with pytest.raises(FederationError, match="keys for another sum of round 1: this silo has given its shares"):
        Round(4, silos=one.silos).advertise()
    Round(4, number=2, silos=one.silos).advertise().mask().reveal()


def test_a_session_that_is_kept_is_unmasked_later() -> None:
    one = Round(4).advertise().mask(["s03"]).reveal(["s00", "s01"])
    with pytest.raises(FederationError, match="1 silos are left"):
        one.tally.total()
    kept, masked = one.tally.kept()
    one.tally = Tally.of(Kept.model_validate_json(kept.model_dump_json()), masked)
    assert one.reveal().tally.total()[0].tobytes() == one.plain().tobytes()


@pytest.mark.parametrize(
    ("survivors", "dropped", "rule"),
    [
        ("s00 s01 s02", "", "it names this silo and every silo of the session, and no other"),
        ("s00 s01 s02 s03 s04", "", "and no other"),
        ("s01 s02 s03", "s00", "it names this silo"),
        ("s00 s01", "s02 s03", "2 silos are left in the round"),
    ],
)
def test_a_list_of_survivors_is_refused(survivors: str, dropped: str, rule: str) -> None:
    one = Round(4).advertise().mask()
    with pytest.raises(FederationError, match=rule):
        one.silos["s00"].reveal(unmask(one, survivors, dropped))


def test_nothing_is_revealed_before_an_update_is_sent() -> None:
    one = Round(4).advertise()
    one.mask(["s00"])
    asked = with_(one.tally.unmask("s01"), closed=with_(one.tally.closed("s01"), survivors=one.names, dropped=[]))
    with pytest.raises(FederationError, match="this silo has sent no update in it"):
        one.silos["s00"].reveal(asked)


def test_survivors_must_have_signed_one_list() -> None:
    one = Round(4, agrees=True).advertise().mask()
    signed = {name: one.silos[name].agree(one.tally.closed(name)).signature for name in one.names}
    with pytest.raises(FederationError, match="2 signatures of the survivors: 3 must have signed one list"):
        one.silos["s00"].reveal(
            one.tally.unmask("s00", {n: signed[n] for n in ("s00", "s01")} | {"s02": "0" * 128})
        )
    for name in one.names:
        one.tally.reveal(name, one.silos[name].reveal(one.tally.unmask(name, signed)))
    assert one.tally.total()[0].tobytes() == one.plain().tobytes()


def test_a_signed_list_is_the_only_one() -> None:
    one = Round(4, agrees=True).advertise().mask()
    one.silos["s00"].agree(one.tally.closed("s00"))
    with pytest.raises(FederationError, match="another list of survivors"):
        one.silos["s00"].agree(unmask(one, "s00 s01 s02", "s03").closed)


def wrong(share: str) -> str:
    return f"{int(share, 16) ^ 1:064x}"


def test_a_wrong_share_is_named_where_there_are_more_than_needed() -> None:
    one = Round(5).advertise().mask(["s04"])
    for name in one.names[:4]:
        sent = one.silos[name].reveal(one.tally.unmask(name))
        if name == "s01":
            sent = with_(sent, secrets={n: wrong(s) if n == "s02" else s for n, s in sent.secrets.items()})
        one.tally.reveal(name, sent)
    total, faults = one.tally.total()
    assert total.tobytes() == one.plain().tobytes()
    assert faults == {"s01": "it has sent a wrong share of s02, or got one from it"}


@pytest.mark.parametrize("kind", ["secrets", "keys"])
def test_wrong_shares_end_the_round_by_name_where_no_others_are_left(kind: str) -> None:
    one = Round(4).advertise().mask(["s03"])
    of = {"secrets": "s02", "keys": "s03"}[kind]
    for name in one.names[:3]:
        sent = one.silos[name].reveal(one.tally.unmask(name))
        if name == "s01":
            sent = with_(sent, **{kind: {n: wrong(s) if n == of else s for n, s in getattr(sent, kind).items()}})
        one.tally.reveal(name, sent)
    with pytest.raises(SpoiltError, match=rf"the shares of {of}: .* or one of s00, s01, s02 has sent one"):
        one.tally.total()


def test_the_server_refuses_what_it_has_not_asked_for() -> None:
    one = Round(4)
    sent = {name: one.silos[name].advertise(one.tally.setup(name)) for name in one.names}
    with pytest.raises(FederationError, match="the shares of s00: they must be one for every other holder"):
        one.tally.advertise("s00", with_(sent["s00"], sealed={}))
    one.tally.advertise("s00", sent["s00"])
    with pytest.raises(FederationError, match="the keys of s01: another silo has the same"):
        one.tally.advertise("s01", with_(sent["s01"], mask=sent["s00"].mask))
    for name in one.names[1:3]:
        one.tally.advertise(name, sent[name])
    with pytest.raises(FederationError, match="an update of s03: each silo that has sent keys sends one"):
        one.tally.add("s03", np.zeros(50, np.uint32))
    with pytest.raises(FederationError, match="it must be uint32 numbers"):
        one.tally.add("s00", np.zeros(50, np.uint64))
    one.mask()
    with pytest.raises(FederationError, match="an update of s00: each silo that has sent keys sends one"):
        one.tally.add("s00", one.sent["s00"])
    with pytest.raises(FederationError, match="the shares of s00: they must be those that it was asked for"):
        one.tally.reveal("s00", Revealed(secrets={}, keys={}))
    with pytest.raises(FederationError, match="shares of s03: only survivors give shares"):
        one.tally.reveal("s03", Revealed(secrets={}, keys={}))


@pytest.mark.parametrize("kind", [SetUp, Advertised, Masking, Unmask, Revealed, Card])
@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"terms": 1}', "[" * 100_000])
def test_other_texts_are_no_messages(kind: type[Message], text: str) -> None:
    if kind is Revealed and text == "{}":
        text = '{"secrets": {"a": "no key"}, "keys": {}}'
    with pytest.raises(FederationError, match=f"shop's {kind.__name__} of secure aggregation"):
        read(kind, text, "shop")


def test_messages_survive_the_wire() -> None:
    one = Round(4).advertise().mask(["s03"])
    for message in (one.tally.setup("s00"), one.tally.masking("s00"), one.tally.unmask("s00")):
        assert read(type(message), message.model_dump_json(), "server") == message
    state = one.silos["s00"].state
    assert State.model_validate_json(state.model_dump_json()) == state


def test_a_key_that_agrees_with_any_other_is_refused() -> None:
    one = Round(3)
    bad = one.silos["s01"]
    low = "00" * 32
    card = with_(
        bad.card("run"), sealing=low, signature=ciphers.signed(bad.identity, "card", "run", "s01", low).hex()
    )
    with pytest.raises(FederationError, match="the keys of s01: they are not keys of X25519"):
        one.silos["s00"].advertise(peers(one.tally.setup("s00"), s01=card))
