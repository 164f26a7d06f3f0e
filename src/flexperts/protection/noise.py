"""Differential privacy of a client's update: clipping, noise on the client or on the mean, and its epsilon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from math import inf, sqrt
from typing import Any

import numpy as np
from scipy.special import ndtri
from torch import Tensor

from flexperts.communication.average import weighted_mean
from flexperts.communication.compression import Packed
from flexperts.communication.messages import Update
from flexperts.config.federation import PrivacyConfig
from flexperts.errors import ConfigError
from flexperts.methods.flex import Flex
from flexperts.methods.kit.method import Method
from flexperts.parameters.vector import Vector
from flexperts.protection.protection import Protection

_ACCOUNTANT = "dp_accounting"
_BITS = 52
"""Random bits of a value; with one more, adding 0.5 would round."""
_LEAST = 1e-4
"""Noise over sensitivity below which epsilon, over 5e7 there, counts as infinite: the accountant diverges."""


class Noise(Protection):
    """Base of central and local noise."""

    key = "privacy.noise"

    def check(self, method: Method) -> None:
        """Refuse FLEx's shared selection, whose reports get no noise, and an installation without accountant."""
        if isinstance(method, Flex) and self.config.graft.sharing != "personal":
            raise ConfigError(
                f"graft.sharing = {self.config.graft.sharing!r} with privacy.noise = {self.config.privacy.noise!r}",
                "clients would report, without noise, how well each expert fits their rows",
                "set graft.sharing = 'personal' or privacy.noise = 'none'",
            )
        _check_accountant()

    def spent(self, rounds: int) -> dict[str, Any]:
        """Return the epsilon after some rounds, with the settings it comes from.

        Rounds of Gaussian noise with multiplier z compose to one of z / sqrt(rounds), whose epsilon is known
        exactly (Balle and Wang, 2018). Central: with or without one client's updates, which change the sum by up to
        ``clip``. Local: any update of a client against any other, up to 2 ``clip`` apart. Sampling of clients
        does not lower epsilon here: a fixed number is drawn in every round, with a known seed.
        """
        privacy = self.config.privacy
        epsilon = self.epsilon(rounds) if rounds else 0.0
        return {
            "mode": privacy.noise,
            "clip": privacy.clip,
            "noise_multiplier": privacy.noise_multiplier,
            "delta": privacy.delta,
            "epsilon": epsilon,
        }

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon of some rounds, at least one."""
        privacy = self.config.privacy
        return gaussian_epsilon(accounted_multiplier(privacy) / sqrt(rounds), privacy.delta)


class LocalNoise(Noise):
    """Each client clips its update and adds noise before it is sent.

    Flower's ``LocalDpMod`` does the same to a ClientApp's reply. It is not used because a deployed silo's
    ClientApp is only a relay, which would receive the update without noise.
    """

    hides, counts_once = frozenset({"loss", "tokens"}), True

    def outgoing(self, change: Vector, memory: dict[str, Tensor]) -> tuple[Vector, Packed | None]:
        """Return the update, clipped and with noise."""
        return noised(change, self.config.privacy.clip, self.config.privacy.noise_multiplier), None


class CentralNoise(Noise):
    """The server clips every update and adds noise to their mean.

    Flower's wrapper is not used: it draws noise from NumPy's global stream, which any library may have seeded,
    divides by the number of sampled clients and not of those that answered, fails on an update of norm 0, and
    holds all replies in memory. ``tests/federation/test_reduction.py`` compares clipping and mean with it.
    """

    draws = True

    def check(self, method: Method) -> None:
        """Refuse robust rules too: it is not known how much one client can change their result."""
        if self.config.federation.aggregation != "mean":
            raise ConfigError(
                f"federation.aggregation = {self.config.federation.aggregation!r} with privacy.noise = 'central'",
                "central noise needs a mean, where it is known how much one client can change",
                "set federation.aggregation = 'mean' or privacy.noise = 'local'",
            )
        super().check(method)

    def combined(self, changes: Iterator[Update]) -> Vector:
        """Return the mean of clipped updates, with noise for the number of clients that answered."""
        clip, clients = self.config.privacy.clip, 0

        def bounded() -> Iterator[Update]:
            nonlocal clients
            for change in changes:
                clients += 1
                yield replace(change, payload=replace(change.payload, vector=clipped(change.vector, clip)))

        mean = weighted_mean(bounded())
        return mean + gaussian(mean.size, self.config.privacy.noise_multiplier * clip / clients)


class DistributedNoise(Noise):
    """Each client adds its share of the noise on the sum before it masks its update; no one sees less noise.

    Source: Kairouz, Liu and Steinke, 2021 (arXiv 2102.06387). The shares add up to ``noise_multiplier`` when as few
    clients as possible stay, and to more with more. The noise is added to whole numbers in
    ``communication/secure/fixed_point.py``.
    """

    hides = frozenset({"loss", "tokens"})

    def check(self, method: Method) -> None:
        """Refuse a run without secure aggregation too: a share of the noise hides no single update."""
        if self.config.privacy.aggregation != "secure":
            raise ConfigError(
                "privacy.noise = 'distributed' with privacy.aggregation = 'plain'",
                "each client adds its share of the noise only, which does not hide an update that is seen singly",
                "set privacy.aggregation = 'secure', or privacy.noise = 'local'",
            )
        super().check(method)

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon of some rounds of discrete Gaussian noise.

        Its sum satisfies the Renyi bound of Gaussian noise with the same multiplier (theorem 1 of the source, whose
        term for sums is zero in float64 with the least standard deviation that is allowed).
        """
        from dp_accounting import GaussianDpEvent, rdp  # over a second of imports

        privacy, accountant = self.config.privacy, rdp.RdpAccountant()
        accountant.compose(GaussianDpEvent(privacy.noise_multiplier), rounds)
        return float(accountant.get_epsilon(privacy.delta))


def accounted_multiplier(privacy: PrivacyConfig) -> float:
    """Return the noise of one round over what one client can change: ``clip``, or 2 ``clip`` under local noise."""
    return privacy.noise_multiplier / (2 if privacy.noise == "local" else 1)


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Return the epsilon of one Gaussian release; infinite where there is next to no noise.

    Source: Balle and Wang, 2018 (arXiv 1805.06530). Releases with multipliers z_i compose to one with
    (sum of 1 / z_i^2)^(-1/2).

    Args:
        multiplier: Standard deviation of the noise over the sensitivity.
        delta: The delta at which epsilon is given.

    Raises:
        ConfigError: This installation has no accountant.
    """
    _check_accountant()
    from dp_accounting import get_epsilon_gaussian  # over a second of imports

    return float(get_epsilon_gaussian(multiplier, delta)) if multiplier >= _LEAST else inf


def clipped(change: Vector, norm: float) -> Vector:
    """Return an update scaled down to an L2 norm of at most ``norm``; a shorter one is unchanged.

    Source: flat clipping of McMahan et al., 2018 (arXiv 1710.06963).
    """
    length = float(np.sqrt(np.square(change, dtype=np.float64).sum()))
    if length <= norm:
        return change
    with np.errstate(invalid="ignore"):  # the server refuses an update that is not finite
        return np.asarray(change * np.float32(norm / length))


def gaussian(size: int, std: float) -> Vector:
    """Return normal noise from the operating system's random bytes.

    It has no seed: the recipe's seed is known to everyone, and any library in the process may have seeded NumPy's
    global stream, from which Flower's own noise comes.
    """
    bits = np.frombuffer(os.urandom(8 * size), np.uint64) >> np.uint64(64 - _BITS)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-_BITS  # above 0 and below 1
    return np.asarray(std * ndtri(uniform), dtype=np.float32)


def noised(change: Vector, clip: float, noise_multiplier: float) -> Vector:
    """Return a clipped update with noise, as a client sends it under local differential privacy."""
    return clipped(change, clip) + gaussian(change.size, noise_multiplier * clip)


def _check_accountant() -> None:
    if find_spec(_ACCOUNTANT) is None:
        raise ConfigError(
            "privacy.noise", "epsilon is computed by dp-accounting", "run pip install 'flexperts[privacy]'"
        )
