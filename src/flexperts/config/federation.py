"""Settings of the rounds: who must answer by when, what is refused, how updates are protected and packed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flexperts.config.section import Section


class FederationConfig(Section):
    """The rounds: who takes part, how long they have, what is refused, how updates are combined."""

    rounds: int = Field(3, ge=1)
    """Number of rounds."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that is drawn to train in each round; all are evaluated."""
    mode: Literal["synchronous", "buffered"] = "synchronous"
    """synchronous = a round waits for all clients that were drawn; buffered = it ends with the first ``buffer``
    updates, and those of the others count in the round in which they arrive; see docs/slow-silos.md."""
    buffer: int | None = Field(None, ge=1)
    """With mode "buffered", updates that end a round. Then ``participation`` is the share of the clients that train
    at the same time."""
    staleness: float = Field(0.5, ge=0)
    """With mode "buffered", an update that is s rounds late counts (1 + s) to the power of minus this."""
    step_seconds: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Simulated seconds of an optimizer step by client, 1 for others: who is late in a buffered run on one machine.
    The simulated time is in rounds.jsonl. Silos on other machines have real time."""
    min_clients: int = Field(1, ge=1)
    """Clients that must have joined before round 1; a deployed run waits for them."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of a round's participants whose updates must be usable; with fewer the run stops, to be resumed."""
    deadline: float = Field(3600.0, gt=0)
    """Seconds that a deployed run waits for clients to join, and in each round to train and to evaluate."""
    max_update_rms: float = Field(10.0, gt=0)
    """Root mean square of an update's values (trained minus sent) above which it is refused."""
    max_norm_ratio: Annotated[float, Field(gt=1)] | Literal["off"] = 10.0
    """How many times the round's median an update may be, both as root mean square; a larger one is refused. It
    needs three usable updates in the round. "off" = max_update_rms alone. Not used in runs in one process."""
    max_share: float = Field(0.5, gt=0, le=1)
    """Largest share of one silo in a round's mean; a silo that reports more rows counts for fewer. With n updates
    the limit is at least 1/n; with fewer than three, or at 1, there is none. Not used in runs in one process."""
    max_message_bytes: int = Field(2**30, ge=2**20)
    """Size of the largest message that the server reads. An update is limited to what the method declares; this
    limit is for initial weights, whose size the server does not know."""
    aggregation: Literal["mean", "median", "trimmed_mean", "krum"] = "mean"
    """How updates are combined: their mean, weighted by rows, or a rule that tolerates some wrong updates. Such a
    rule counts every client once and needs all replies in memory; see docs/privacy.md."""
    trim: float = Field(0.25, gt=0, lt=0.5)
    """Share of the updates cut off at each end of every value (trimmed_mean), rounded down to whole updates, of
    which there must be at least one."""
    malicious_clients: int = Field(1, ge=0)
    """Number of wrong updates to tolerate (krum); there must be at least three more updates than that."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if (self.mode == "buffered") != (self.buffer is not None):
            raise ValueError("mode = 'buffered' and buffer, such as 4, belong together: set both or neither")
        return self

    def seconds_of_step(self, client: str) -> float:
        """Return the simulated seconds of a client's optimizer step."""
        return self.step_seconds.get(client, 1.0)

    def turns(self, full: int = 0) -> int:
        """Return the rounds that a client takes part in, on average and where rounds are synchronous; at least one.

        Args:
            full: How many of the first rounds all clients take part in.
        """
        return max(1, round(full + (self.rounds - full) * self.participation))

    def drawn(self, clients: int) -> int:
        """Return how many of a run's clients train at the same time, at least one."""
        return max(1, round(self.participation * clients))


class PrivacyConfig(Section):
    """What protects the shared update of one client: noise and secure aggregation; see docs/privacy.md."""

    noise: Literal["none", "central", "local", "distributed"] = "none"
    """central = the server clips every update and adds noise to their mean; local = each client clips its update
    and adds noise to it before it is sent; distributed = with secure aggregation, each client adds its share of the
    noise that central would add. In all, every client counts once."""
    clip: float = Field(1.0, gt=0)
    """L2 norm that an update (trained minus sent) is clipped to, with noise or secure aggregation."""
    noise_multiplier: float = Field(1.0, gt=0)
    """Standard deviation of the noise over clip: on the sum of the updates (central, and at least, distributed), on
    each update (local)."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta at which epsilon is reported."""
    aggregation: Literal["plain", "secure"] = "plain"
    """secure = clients mask their updates so that the server learns their sum alone; not yet reviewed by anyone
    outside, see docs/secure-aggregation.md."""
    survivors: float = Field(0.5, ge=0.5, lt=1)
    """With secure aggregation, more than this share of a round's clients, and at least three, must stay to its end.
    Fewer of them, together with the server, cannot take off another client's masks."""
    agreement: bool = False
    """With secure aggregation, clients sign one list of those whose updates have arrived before they give shares:
    against a server that tells them different lists. It is one more exchange in every round."""


Packing = Literal["none", "fp16", "int8", "int4", "top_k", "top_k_int4", "top_k_sign"]


class CompressionConfig(Section):
    """How weights are packed for the wire, in both directions; off by default, see docs/communication.md."""

    kind: Packing = "none"
    """How a client's update is packed. fp16 = half precision; int8, int4 = 8 or 4 bits and one scale per block;
    top_k = the largest values only, in half precision; top_k_int4, top_k_sign = the largest values only, in 4 bits
    or as signs with one scale per block, and their places entropy-coded."""
    downlink: Packing = "none"
    """How the server packs what changed in the shared weights since what a client has, in the same words. none =
    every request has all weights in fp32. For methods that send all clients the same."""
    block: int = Field(256, ge=1)
    """Values that share one scale (int8, int4, top_k_int4, top_k_sign)."""
    fraction: float = Field(0.05, gt=0, le=1)
    """Share of the values that is sent (top_k, top_k_int4, top_k_sign)."""
    error_feedback: bool = True
    """Add what packing lost to the next round's change, in both directions."""
    feedback_decay: float = Field(1.0, gt=0, le=1)
    """Share of what packing lost that is added; below 1, older changes count for less, as in a momentum."""

    @property
    def down(self) -> CompressionConfig:
        """The same settings with the downlink's packing as ``kind``."""
        return self.model_copy(update={"kind": self.downlink})
