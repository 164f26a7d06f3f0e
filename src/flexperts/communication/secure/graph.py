"""Who holds whose shares: all of all, or, with more than a hundred clients, each those of some random neighbours.

Source: Bell et al., CCS 2020 (ePrint 2020/704), section 3: a random Harary graph, that is, clients in a random
ring, each with the nearest k. k is the smallest even number for which, with a third of the clients colluding with
the server and a fifth dropping out, (1) no client has as many colluding share holders as its threshold, and the
honest survivors stay connected, but for a probability of 2^-40, and (2) every client has as many surviving holders
as its threshold, but for a probability of 2^-20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import SystemRandom

COLLUDING, DROPPING = 1 / 3, 1 / 5
_SECURITY, _CORRECTNESS = 2.0**-41, 2.0**-20
"""Each of the two events in (1) has half of 2^-40."""
_COMPLETE = 100
"""Most clients among which all hold shares of all; any half of them may then collude with the server."""
_BETWEEN = 0.6
"""Least share of a client's holders that must answer, among neighbours: between 1/3 and 4/5, it keeps k small."""
FEWEST = 3
"""Fewest silos whose sum is made: with two, each can compute the other's update from it."""


def threshold_of(holders: int, share: float) -> int:
    """Return how many of a secret's holders must answer: more than a share of them, and at least three."""
    return max(FEWEST, math.floor(share * holders + 1e-9) + 1)


@lru_cache(64)
def degree(clients: int, share: float) -> int:
    """Return how many neighbours each client has; with few clients, and where no number is enough, all others.

    Args:
        clients: Number of clients.
        share: See ``threshold_of``.
    """
    if clients <= _COMPLETE:
        return clients - 1
    bad, gone = math.ceil(COLLUDING * clients), math.ceil(DROPPING * clients)
    for k in range(2, clients - 1, 2):
        threshold = threshold_of(k + 1, share)  # each holds a share of its own secrets, too
        if (
            clients * _tail(clients, bad, k, threshold) <= _SECURITY
            and _parted(clients, bad + gone, k) <= _SECURITY
            and clients * _tail(clients, gone, k, k + 2 - threshold) <= _CORRECTNESS
        ):
            return k
    return clients - 1


def holder_share(clients: int, share: float) -> float:
    """Return the share of a secret's holders that must answer, from the share of a round's clients that must."""
    return share if clients <= _COMPLETE else max(share, _BETWEEN)


def holders(names: Sequence[str], share: float) -> dict[str, list[str]]:
    """Return each client's share holders, sorted, itself among them; the relation is mutual.

    Args:
        names: The round's clients.
        share: What ``holder_share`` returns.
    """
    order, k = sorted(names), degree(len(names), share)
    if k == len(order) - 1:
        return dict.fromkeys(order, order)
    SystemRandom().shuffle(order)
    reach = range(-k // 2, k // 2 + 1)
    return {name: sorted(order[(at + step) % len(order)] for step in reach) for at, name in enumerate(order)}


def _tail(clients: int, marked: int, drawn: int, least: int) -> float:
    """Return the probability that of clients drawn without replacement at least so many are marked."""
    most = min(drawn, marked)
    ways = sum(
        math.comb(marked, i) * math.comb(clients - marked, drawn - i) for i in range(max(0, least), most + 1)
    )
    return ways / math.comb(clients, drawn)


def _parted(clients: int, bad: int, k: int) -> float:
    """Return a bound on the probability that the ring is cut when the bad clients are taken out.

    Two places with k / 2 bad clients in a row are needed.
    """
    if k > bad:
        return 0.0
    pairs = clients * (clients - k - 1) / 2
    log = math.lgamma(clients - k + 1) - math.lgamma(bad - k + 1) + math.lgamma(bad + 1) - math.lgamma(clients + 1)
    return pairs * math.exp(log)
