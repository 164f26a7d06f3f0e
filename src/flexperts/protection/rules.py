"""Settings that protect or pack updates: whether they fit a method, and what privacy has cost so far."""

from __future__ import annotations

from importlib.util import find_spec
from math import sqrt
from typing import Any

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.flex import Flex
from flexperts.methods.kit.method import Method
from flexperts.protection.incoming import fewest

_ACCOUNTANT = "dp_accounting"


def check_additive(method: Method, config: RunConfig) -> None:
    """Refuse noise, robust rules and packing that a method, each other or this installation do not allow.

    Raises:
        ConfigError: What is wrong, and how to mend it.
    """
    federation, privacy = config.federation, config.privacy
    chosen = {
        "federation.aggregation": (federation.aggregation, "mean"),
        "privacy.noise": (privacy.noise, "none"),
        "compression.kind": (config.compression.kind, "none"),
    }
    for setting, (value, off) in chosen.items():
        if value != off and not method.additive:
            raise ConfigError(
                f"{setting} = {value!r} with method {method.name!r}",
                "it works on replies that are the sent weights after training, and this method's are not",
                f"set {setting} = {off!r}, or take a method such as 'flex' or 'fedavg'",
            )
    if privacy.noise != "none":
        _check_noise(method, config)


def check_enough(config: RunConfig, clients: int) -> None:
    """Refuse a robust rule that can do nothing with so many clients.

    Raises:
        ConfigError: Fewer would take part in a round than the rule needs.
    """
    federation = config.federation
    drawn, least = federation.drawn(clients), fewest(federation)
    if drawn < least:
        raise ConfigError(
            f"federation.aggregation = {federation.aggregation!r} with {drawn} clients in a round",
            f"with its settings it needs at least {least}, or it keeps nothing off",
            "change federation.aggregation, trim, malicious_clients or participation",
        )


def privacy_spent(config: RunConfig, rounds: int) -> dict[str, Any] | None:
    """Return what differential privacy guarantees after some rounds; None without noise.

    Rounds of Gaussian noise with multiplier z compose to one of z / sqrt(rounds), whose epsilon is known exactly
    (Balle and Wang, 2018). Central: with or without one client's updates, which change their sum by ``clip``.
    Local: any update of a client against any other, up to 2 ``clip`` apart. A drawn share of clients is not counted
    as amplification: as many are drawn every round, by a seed that is known.

    Args:
        config: The run.
        rounds: Finished rounds.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    privacy = config.privacy
    if privacy.noise == "none":
        return None
    _check_accountant()
    from dp_accounting import get_epsilon_gaussian  # over a second of imports

    multiplier = privacy.noise_multiplier / (2 if privacy.noise == "local" else 1)
    epsilon = get_epsilon_gaussian(multiplier / sqrt(rounds), privacy.delta) if rounds else 0.0
    return {
        "mode": privacy.noise,
        "clip": privacy.clip,
        "noise_multiplier": privacy.noise_multiplier,
        "delta": privacy.delta,
        "epsilon": float(epsilon),
    }


def _check_noise(method: Method, config: RunConfig) -> None:
    if config.federation.aggregation != "mean" and config.privacy.noise == "central":
        raise ConfigError(
            f"federation.aggregation = {config.federation.aggregation!r} with privacy.noise = 'central'",
            "central noise is for a mean: what one client changes in it is known",
            "set federation.aggregation = 'mean' or privacy.noise = 'local'",
        )
    if isinstance(method, Flex) and config.graft.sharing != "personal":
        raise ConfigError(
            f"graft.sharing = {config.graft.sharing!r} with privacy.noise = {config.privacy.noise!r}",
            "clients then tell how well each expert fits their rows, which no noise covers",
            "set graft.sharing = 'personal' or privacy.noise = 'none'",
        )
    _check_accountant()


def _check_accountant() -> None:
    if find_spec(_ACCOUNTANT) is None:
        raise ConfigError(
            "privacy.noise", "epsilon is computed by dp-accounting", "pip install 'flexperts[privacy]'"
        )
