"""Silos without a model that take part in secure aggregation, for the scripted grid."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import RecordDict

from flexperts.communication.compression import Packed
from flexperts.communication.messages import info_of, metrics_of, payload_of, records
from flexperts.communication.secure import ciphers
from flexperts.communication.secure.messages import Closed, Masking, Rules, SetUp, Unmask, read
from flexperts.communication.secure.silo import Silo as Masker
from flexperts.communication.secure.silo import State
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.noise import clipped

from .scripted_grid import Silo

CLIP = 5.0
MASKED = (
    "method.name=fedavg",
    "federation.rounds=3",
    "federation.deadline=50",
    "federation.max_norm_ratio=off",
    "privacy.aggregation=secure",
    f"privacy.clip={CLIP}",
)


@dataclass
class MaskingSilo(Silo):
    """A silo whose updates are masked; ``factor`` is what it multiplies an update by after clipping."""

    factor: int = 1
    agrees: bool = False
    masker: Masker = field(init=False)

    def __post_init__(self) -> None:
        self.masker = Masker(self.name, ciphers.new_secret(), State(), Rules(clip=CLIP, agrees=self.agrees))

    def change(self, number: int) -> Vector:
        return clipped(super().change(number), CLIP)

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        info, reply = info_of(content), records({}) if kind == "query.keys" else super().answer(kind, content)
        if kind == "query.join":
            return records({**info_of(reply), "card": self.masker.card(info["run"]).model_dump_json()}, {})
        if kind == "query.keys":
            told = {"client": self.name, "keys": "", "shares": ""}
            if "unmask" in info:
                told["shares"] = self.masker.reveal(read(Unmask, info["unmask"], "server")).model_dump_json()
            if "closed" in info:
                told["agreed"] = self.masker.agree(read(Closed, info["closed"], "server")).model_dump_json()
            if "setup" in info:
                told["keys"] = self.masker.advertise(read(SetUp, info["setup"], "server")).model_dump_json()
            return records(told, {})
        if kind != "train":
            return reply
        change = payload_of(reply, self.name).vector - payload_of(content, "server").vector
        masked = self.masker.masked(read(Masking, info["masking"], "server"), info["round"], change, self.rows)
        if self.factor != 1:
            masked = masked * masked.dtype.type(self.factor)
        heading = {name: info_of(reply)[name] for name in ("client", "round", "base")}
        size = Payload(payload_of(reply, self.name).manifest, change)
        return records(heading, metrics_of(reply), size, Packed({"masked": masked}, {"packing": "masked"}))


def four(**settings: int) -> list[MaskingSilo]:
    return [MaskingSilo(name, rows, **settings) for name, rows in zip("abcd", (3, 5, 7, 4), strict=True)]
