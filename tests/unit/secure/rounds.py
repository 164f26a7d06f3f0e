"""One round of secure aggregation without models, messages or machines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from flexperts.communication.secure import ciphers
from flexperts.communication.secure.fixed_point import Ring
from flexperts.communication.secure.messages import Masking, Rules, Unmask
from flexperts.communication.secure.silo import Silo, State
from flexperts.communication.secure.tally import Tally, new_session
from flexperts.parameters.vector import Vector

CLIP = 2.0
SIZE = 50


def silo(name: str, rules: Rules = Rules(clip=CLIP)) -> Silo:  # noqa: B008 - it is frozen
    return Silo(name, ciphers.new_secret(), State(), rules)


@dataclass
class Round:
    """Silos a, b, c, ... in one session."""

    count: int
    share: float = 0.5
    size: int = SIZE
    number: int = 1
    agrees: bool = False
    noise: float = 0.0
    silos: dict[str, Silo] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    sent: dict[str, Ring] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f"s{i:02}" for i in range(self.count)]
        rules = Rules(clip=CLIP, share=self.share, multiplier=self.noise, agrees=self.agrees)
        self.silos = self.silos or {name: silo(name, rules) for name in names}
        self.rows = self.rows or {name: 3 + i for i, name in enumerate(names)}
        stream = np.random.default_rng(self.number)
        self.changes: dict[str, Vector] = {}
        for name in names:
            drawn = stream.normal(size=self.size)
            self.changes[name] = (drawn * CLIP / max(1.0, float(np.linalg.norm(drawn)))).astype(np.float32)
        cards = {name: one.card("run") for name, one in self.silos.items()}
        self.tally = Tally(new_session("run", self.number, cards, self.rows, rules))

    @property
    def names(self) -> list[str]:
        return list(self.silos)

    def advertise(self, without: Collection[str] = (), order: Sequence[str] | None = None) -> Round:
        for name in order or self.names:
            if name not in without:
                self.tally.advertise(name, self.silos[name].advertise(self.tally.setup(name)))
        return self

    def mask(self, without: Collection[str] = (), order: Sequence[str] | None = None) -> Round:
        told: dict[str, Masking] = {name: self.tally.masking(name) for name in self.tally.ready}
        for name in order or self.names:
            if name in told and name not in without:
                self.sent[name] = self.masked(name, told[name])
                self.tally.add(name, self.sent[name])
        return self

    def masked(self, name: str, told: Masking | None = None) -> Ring:
        told = told or self.tally.masking(name)
        return self.silos[name].masked(told, self.number, self.changes[name], self.rows[name])

    def reveal(self, without: Collection[str] = (), order: Sequence[str] | None = None) -> Round:
        asked: dict[str, Unmask] = {name: self.tally.unmask(name) for name in self.tally.survivors}
        for name in order or self.names:
            if name in asked and name not in without:
                self.tally.reveal(name, self.silos[name].reveal(asked[name]))
        return self

    def plain(self) -> Ring:
        """Return the sum of the survivors' whole numbers, without any mask."""
        total = np.zeros(self.size, self.tally.numbers.dtype)
        for name in self.tally.survivors:
            weight = self.rows[name] / max(self.rows.values())
            total += self.tally.numbers.encode(self.changes[name], weight)
        return total
