"""Updates as whole numbers modulo 2^32 or 2^64, with a scale at which the sum of all clients cannot overflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexperts.communication.secure.discrete_gaussian import LEAST, discrete_gaussian
from flexperts.errors import FederationError

Ring = NDArray[Any]
"""A flat array of uint32 or uint64; sums wrap around."""
_FINE = 2**20
"""Steps from 0 to the clip that a value must have at least; where 32 bits give fewer, 64 are used."""
_FINEST = 2**44
"""Most steps: products with a float64 are then exact to one step."""
_TAIL = 12.0
"""Standard deviations of the noise that have room; a value has more with a probability below 1e-32."""
_SHORTER = 0.01
_SLACK = 1e-3
"""Share by which rounding in fp32 may leave a value above the clip."""


@dataclass(frozen=True)
class FixedPoint:
    """The whole numbers of one round.

    Args:
        clip: Largest magnitude of a value; an update of at most this L2 norm has no larger one.
        clients: Most clients whose values are added.
        noise: Standard deviation of the discrete Gaussian noise that each client adds to a value; 0 adds none.
    """

    clip: float
    clients: int
    noise: float = 0.0

    @property
    def reach(self) -> float:
        """The largest magnitude of a value with its noise, which is cut there."""
        return self.clip + _TAIL * self.noise

    @property
    def bits(self) -> int:
        """Bits of a number: 32, or 64 where the steps of 32 would be too coarse for so many clients."""
        return 32 if (2**31 - 1) // self.clients >= _FINE else 64

    @property
    def most(self) -> int:
        """The whole number of ``reach``: ``clients`` of them add up to at most half of the range."""
        return min(((1 << self.bits - 1) - 1) // self.clients, _FINEST)

    @property
    def step(self) -> float:
        """What one whole number is worth; a client's value is rounded by at most half of it."""
        return self.reach / self.most

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a number, little-endian."""
        return np.dtype(f"<u{self.bits // 8}")

    def encode(self, change: NDArray[np.float32], weight: float = 1.0) -> Ring:
        """Return a clipped update times a weight as whole numbers, with noise if there is any.

        With noise, the update is made so much shorter that it is not above the clip after rounding either.

        Args:
            change: The update; its values are at most ``clip``.
            weight: From 0 to 1.

        Raises:
            FederationError: A value is not finite or above the clip, or the weight is: the sum could overflow.
        """
        largest = float(np.abs(change).max(initial=0.0))
        if not (0 <= weight <= 1 and largest <= self.clip * (1 + _SLACK)):  # NaN is refused, too
            raise FederationError(
                f"an update with a value of magnitude {largest:.6g} and the weight {weight:.6g}",
                f"values are at most the clip of {self.clip:g} and weights at most 1, or the sum could overflow",
                "lower training.lr, if this silo's training has diverged",
            )
        shorter = self.step * change.size**0.5 / 2 / self.clip if self.noise else 0.0
        steps = change * np.float64(weight * (1 - shorter) / self.step)
        np.rint(steps, out=steps)
        if self.noise:
            if shorter > _SHORTER or self.noise < LEAST * self.step:
                raise FederationError(
                    f"noise of {self.noise / self.step:.3g} steps on {change.size:,} values",
                    f"it needs {LEAST:g} steps, and rounding may take {_SHORTER:.0%} of the clip at most",
                    "raise privacy.noise_multiplier, or lower it if it is above 1000",
                )
            steps += discrete_gaussian(change.size, self.noise / self.step)
        np.clip(steps, -self.most, self.most, out=steps)
        return steps.astype(f"<i{self.bits // 8}").view(self.dtype)  # modulo 2^bits

    def decode(self, total: Ring) -> NDArray[np.float64]:
        """Return a sum of encoded updates in their units."""
        return total.view(np.dtype(f"<i{self.bits // 8}")).astype(np.float64) * self.step
