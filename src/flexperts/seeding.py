"""Random streams: one per purpose, derived from (seed, client, round, purpose)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose, the same in every process and on every machine.

    Args:
        seed: The run's seed.
        purpose: What the stream is for, such as ``("clinic", 3, "batches")``.
    """
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> Generator:
    """Return a CPU generator for the stream of a purpose."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def drawn(clients: Iterable[str], count: int, seed: int, number: int) -> list[str]:
    """Return the clients that are drawn to train in a round, sorted.

    Args:
        clients: All clients; a client's place in their order decides.
        count: How many are drawn.
        seed: The run's seed.
        number: The round.
    """
    import torch

    ordered = sorted(clients)
    places = torch.randperm(len(ordered), generator=generator(seed, "participants", number))[:count]
    return sorted(ordered[place] for place in places.tolist())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start torch's global streams from a seed inside the block, on the CPU and on every card in use."""
    import torch

    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cards = range(torch.cuda.device_count() if begun else 0)
    with torch.random.fork_rng(devices=list(cards)):
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed_all(seed)
        yield
