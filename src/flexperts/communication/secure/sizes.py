"""The bytes of a round's messages of secure aggregation, without the masked update, before a run."""

from __future__ import annotations

from collections.abc import Sequence

from flexperts.communication.secure.ciphers import SIZE
from flexperts.communication.secure.messages import Advertised, Card, Revealed, Rules
from flexperts.communication.secure.tally import Tally, new_session

_KEY, _SIGNATURE, _SEALED = "0" * (2 * SIZE), "0" * (4 * SIZE), "0" * (2 * (12 + 2 * SIZE + 16))
_RUN = "0" * 32


def message_bytes(names: Sequence[str], share: float) -> dict[str, tuple[int, int]]:
    """Return client -> bytes that it sends and receives in a round without drop-outs, by the messages themselves.

    Args:
        names: The round's clients.
        share: ``privacy.survivors``.
    """
    cards = dict.fromkeys(names, Card(identity=_KEY, sealing=_KEY, signature=_SIGNATURE))
    tally = Tally(new_session(_RUN, 1, cards, dict.fromkeys(names, 1), Rules(clip=1.0, share=share)))
    answers: dict[str, list[Advertised | Revealed]] = {}
    for number, name in enumerate(tally.cards):
        sealed = {peer: _SEALED for peer in tally.holders[name] if peer != name}
        keys = Advertised(mask=f"{number:064x}", check=_KEY, sealed=sealed, signature=_SIGNATURE)
        tally.advertise(name, keys)
        answers[name] = [keys, Revealed(secrets=dict.fromkeys(tally.holders[name], _KEY), keys={})]
    tally.survivors = list(tally.cards)
    found = {}
    for name, sent in answers.items():
        received = (tally.setup(name), tally.masking(name), tally.unmask(name))
        found[name] = tuple(sum(len(each.model_dump_json()) for each in those) for those in (sent, received))
    return {name: (sent, received) for name, (sent, received) in found.items()}
