"""Secure aggregation as a defence: clipping at the client, and what cannot be combined with it.

The masks are not made here: they need the round's keys. ``communication/secure`` is the protocol, which
``client/masking.py`` and ``server/masked_rounds.py`` run.
"""

from __future__ import annotations

from torch import Tensor

from flexperts.communication.compression import Packed
from flexperts.communication.secure.graph import FEWEST
from flexperts.communication.secure.messages import Rules
from flexperts.config.federation import PrivacyConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import Method
from flexperts.parameters.vector import Vector
from flexperts.protection.noise import clipped
from flexperts.protection.protection import Protection


def rules_of(privacy: PrivacyConfig) -> Rules:
    """Return a recipe's section as the protocol takes it."""
    multiplier = privacy.noise_multiplier if privacy.noise == "distributed" else 0.0
    return Rules(clip=privacy.clip, share=privacy.survivors, multiplier=multiplier, agrees=privacy.agreement)


class SecureAggregation(Protection):
    """The server learns the sum of the clipped updates, and no single one."""

    key, unset = "privacy.aggregation", "plain"

    @property
    def fewest(self) -> int:
        """Silos whose sum hides each of them."""
        return FEWEST

    def check(self, method: Method) -> None:
        """Refuse what needs single updates on the server, or another size of values."""
        federation, privacy, compression = self.config.federation, self.config.privacy, self.config.compression
        excluded = {
            f"federation.aggregation = {federation.aggregation!r}": (
                federation.aggregation != "mean",
                "a robust rule compares single updates, and the server receives their sum alone",
                "set federation.aggregation = 'mean'",
            ),
            f"compression.kind = {compression.kind!r}": (
                compression.kind != "none",
                "masked values are whole numbers of 32 bits, and a packed update is no sum",
                "set compression.kind = 'none'",
            ),
            f"privacy.noise = {privacy.noise!r}": (
                privacy.noise not in ("none", "distributed"),
                "the server has no single update to clip, and local noise is more than a sum needs",
                "set privacy.noise = 'distributed' or 'none'",
            ),
        }
        for setting, (is_set, rule, remedy) in excluded.items():
            if is_set:
                remedy = f"{remedy}, or {self.off}"
                raise ConfigError(f"{setting} with privacy.aggregation = 'secure'", rule, remedy)

    def outgoing(self, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed | None]:
        """Return the update, clipped: the whole numbers that are masked have their scale from the clip."""
        return clipped(change, self.config.privacy.clip), None
