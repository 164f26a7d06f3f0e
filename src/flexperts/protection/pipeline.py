"""All defences that a recipe turns on, in the order of their use: noise, those of other packages, packing.

An installed package adds a defence by an entry point of the group ``flexperts.protections``. Its name is the NAME
of the recipe's ``[protections.NAME]``; its value is ``"package.module:Class"``, a subclass of ``Protection``.
Recipes and messages cannot make the process import other code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from flexperts.communication.average import checked
from flexperts.communication.compression import Packed
from flexperts.communication.messages import DERIVED, Update
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.candidates import check_candidates
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.personal_rounds import PersonalRounds
from flexperts.methods.registry import make_method
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.noise import CentralNoise, DistributedNoise, LocalNoise
from flexperts.protection.packing import Packing
from flexperts.protection.protection import Protection
from flexperts.protection.robust import RobustRule
from flexperts.protection.secure import SecureAggregation

EVERYONE = "all"
"""Client name of the one update that replaces all."""
_GROUP = "flexperts.protections"


def protections(config: RunConfig) -> list[Protection]:
    """Return the defences of a run, in their order."""
    found: list[Protection] = []
    if config.privacy.noise != "none":
        kinds = {"local": LocalNoise, "central": CentralNoise, "distributed": DistributedNoise}
        found.append(kinds[config.privacy.noise](config))
    if config.federation.aggregation != "mean":
        found.append(RobustRule(config))
    found += [_installed(config, name) for name in config.protections]
    if is_secure(config):
        found.append(SecureAggregation(config))
    if config.compression.kind != "none":
        found.append(Packing(config))
    return found


def checked_method(config: RunConfig) -> Method:
    """Return a run's method; refuse settings that do not fit the method, its defences or its floor.

    Raises:
        ConfigError: The settings that do not fit, the rule, and what to change.
    """
    method = make_method(config.method)
    method.check(config)
    check_protections(method, config)
    check_candidates(method, config)
    return method


def check_protections(method: Method, config: RunConfig) -> None:
    """Refuse defences that a method, each other or this installation do not allow."""
    _check_downlink(method, config)
    _check_late(method, config)
    active = protections(config)
    for protection in active:
        if not method.additive:
            raise ConfigError(
                f"{protection.setting} with method {method.name!r}",
                "it needs a mean of replies that are the sent weights after training; this method has no such mean",
                f"{protection.off}, or use a method such as 'fedavg', or 'flex' with aggregation = 'factors'",
            )
    for protection in active:
        protection.check(method)
    combining = [protection.setting for protection in active if _overrides(protection, "combined")]
    counting = [protection.setting for protection in active if protection.counts_once]
    if is_secure(config) and (other := [*combining, *counting]):
        raise ConfigError(
            f"{other[0]} with privacy.aggregation = 'secure'",
            "the server receives the sum of the updates by rows, and no single one to combine",
            "turn one off",
        )
    if len(combining) > 1:
        raise ConfigError(" with ".join(combining), "only one defence can make a round's average", "turn one off")


def _check_downlink(method: Method, config: RunConfig) -> None:
    """Refuse differences between versions of the shared weights where clients do not all receive these."""
    kind, own = config.compression.downlink, type(method)
    if kind != "none" and (own.broadcast is not Method.broadcast or own.final is not Method.final):
        raise ConfigError(
            f"compression.downlink = {kind!r} with method {method.name!r}",
            "it sends what changed in weights that all clients have, and this method sends each client its own, or "
            "more than the shared weights",
            "set compression.downlink = 'none', or use a method such as 'fedavg' or 'flex'",
        )


def _check_late(method: Method, config: RunConfig) -> None:
    """Refuse buffered rounds, and steps by time, where an update is not a change that can be moved and scaled."""
    settings = []
    if config.federation.mode == "buffered":
        settings.append("federation.mode = 'buffered'")
    if config.training.local_seconds is not None:
        settings.append(f"training.local_seconds = {config.training.local_seconds:g}")
    for setting in settings:
        check_plain(method, config, setting)
        others = {
            f"privacy.noise = {config.privacy.noise!r}": config.privacy.noise != "none",
            "privacy.aggregation = 'secure'": is_secure(config),
            f"compression.downlink = {config.compression.downlink!r}": config.compression.downlink != "none",
            "a protection that hides the number of steps": not told(config, ["steps"]),
        }
        if other := next((name for name, active in others.items() if active), None):
            raise ConfigError(
                f"{setting} with {other}",
                "this needs rounds in which all clients train from the same weights, with the same budget",
                "turn one off",
            )


def check_plain(method: Method, config: RunConfig, setting: str) -> None:
    """Refuse a method other than a mean, in every round, of replies that are the shared weights after training.

    Args:
        method: The method.
        config: The run.
        setting: What needs such a method.
    """
    own = type(method)
    sampled = own.participants in (Method.participants, PersonalRounds.participants) and not method.full_rounds
    plain = method.additive and sampled and own.broadcast is Method.broadcast
    if not plain or method.extra_rounds(config.federation.rounds):
        raise ConfigError(
            f"{setting} with method {method.name!r}",
            "it needs a mean of replies that are the shared weights after training, in every round",
            "leave it out, or use a method such as 'fedavg' or 'flex'",
        )


def check_apart(config: RunConfig) -> None:
    """Refuse settings that cannot work where the silos are other machines."""
    ratio = config.federation.max_norm_ratio
    if is_secure(config) and ratio != "off":
        raise ConfigError(
            f"federation.max_norm_ratio = {ratio:g} with privacy.aggregation = 'secure'",
            "it compares the sizes of single updates, and the server receives their sum alone; silos clip their "
            "updates to privacy.clip instead, and the server checks the sum",
            "set federation.max_norm_ratio = 'off'",
        )


def check_enough(config: RunConfig, clients: int) -> None:
    """Refuse a buffer, or a defence, that needs more clients than a round has."""
    drawn, buffer = config.federation.drawn(clients), config.federation.buffer
    if buffer is not None and buffer > drawn:
        raise ConfigError(
            f"federation.buffer = {buffer} with {drawn} clients that train at the same time",
            "a round cannot wait for more updates than there are",
            f"set it to at most {drawn}, or raise federation.participation",
        )
    fewest = drawn if buffer is None else buffer
    for protection in protections(config):
        if fewest < protection.fewest:
            raise ConfigError(
                f"{protection.setting} with {fewest} clients in a round",
                f"with its settings it needs at least {protection.fewest}, or it gives no protection",
                f"{protection.off}, change its settings, or raise federation."
                f"{'participation' if buffer is None else 'buffer'}",
            )


@dataclass(frozen=True)
class Outgoing:
    """What leaves a client after a round.

    Args:
        payload: The weights, as the server will have them.
        packed: The packed update that is sent instead of them, if the recipe packs.
        hidden: The method's own vector where a defence has changed it.
        change: The update by itself, where it is masked before it is sent.
    """

    payload: Payload
    packed: Packed | None = None
    hidden: tuple[Vector, ...] = ()
    change: Vector | None = None


def protect(
    config: RunConfig, received: Payload, trained: Payload, memory: dict[str, Tensor], client: str
) -> Outgoing:
    """Apply the client's side of every defence to its update.

    Args:
        config: The run.
        received: What the server sent.
        trained: What the method sends.
        memory: The client's memory, in which a defence keeps what it needs in the next round.
        client: The client's name, for errors.
    """
    active = [protection for protection in protections(config) if _overrides(protection, "outgoing")]
    if not (trained.size and active):
        return Outgoing(trained)
    if received.manifest != trained.manifest:  # derived values of a broadcast do not come back
        received = Payload.of({n: t for n, t in received.tensors().items() if not n.startswith(DERIVED)})
    trained.check(received.manifest, client)
    change, packed = trained.vector - received.vector, None
    for protection in active:
        change, packed = protection.outgoing(change, memory)
    masked = change if is_secure(config) else None
    return Outgoing(Payload(trained.manifest, received.vector + change), packed, (trained.vector,), masked)


def is_secure(config: RunConfig) -> bool:
    """Return whether updates are masked, and the server learns their sum alone."""
    return config.privacy.aggregation == "secure"


def draws(config: RunConfig) -> bool:
    """Return whether the server draws noise on what it combines, and so may combine a round's updates once only."""
    return any(protection.draws for protection in protections(config))


def told(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Return those of a round's measures that the server receives."""
    hidden = {name for protection in protections(config) for name in protection.hides}
    # With a clock, the recipe decides how few rows a round's loss is of; without one, no change counts per step.
    hidden |= {"shared_steps"} if config.training.local_seconds is None else {"loss", "tokens"}
    return [name for name in names if name not in hidden]


def reduced(config: RunConfig, sent: Payload, updates: Iterable[Update]) -> Iterable[Update]:
    """Return the updates for the method to average: those of the clients, or one that replaces all.

    Args:
        config: The run.
        sent: The shared weights that the clients were sent.
        updates: Replies of the same manifest, sorted by client.
    """
    active = protections(config)
    combining = [protection for protection in active if _overrides(protection, "combined")]
    # A defence that only counts clients once takes the default, a mean.
    once = combining or [protection for protection in active if protection.counts_once]
    if not once:
        return updates
    rows: list[int] = []
    change = once[0].combined(checked(_changes(sent, updates, rows)))
    return [Update(EVERYONE, Payload(sent.manifest, sent.vector + change), sum(rows), {})]


def privacy_spent(config: RunConfig, rounds: int) -> dict[str, Any] | None:
    """Return what the defences guarantee after some finished rounds; None if no defence gives a guarantee."""
    return next((spent for p in protections(config) if (spent := p.spent(rounds)) is not None), None)


def _changes(sent: Payload, updates: Iterable[Update], rows: list[int]) -> Iterator[Update]:
    """Yield the changes by training instead of the weights, each with weight 1, and record the rows."""
    for update in updates:
        rows.append(update.rows)
        yield replace(update, payload=Payload(sent.manifest, update.vector - sent.vector), rows=1)


def _overrides(protection: Protection, method: str) -> bool:
    return getattr(type(protection), method) is not getattr(Protection, method)


@cache
def _points() -> dict[str, EntryPoint]:
    """Return the defences of installed packages; looked up once, because every reply needs them."""
    return {point.name: point for point in entry_points(group=_GROUP)}


def _installed(config: RunConfig, name: str) -> Protection:
    """Return a defence of another package, with its options."""
    points = _points()
    if name not in points:
        raise ConfigError(
            f"protections.{name}",
            f"installed protections are {', '.join(sorted(points)) or 'none'}",
            "install its package on the server and on every silo, or correct the name",
        )
    place = f"protections.{name} at {points[name].value!r}"
    try:
        found = points[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(place, f"it cannot be imported ({error})", "install or fix its package") from error
    if not (isinstance(found, type) and issubclass(found, Protection)):
        raise ConfigError(place, "it must be a subclass of flexperts.Protection", "fix its package")
    try:
        return found(config, name, found.Options.model_validate(config.protections[name]))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"protections.{name}", faults, "correct these options") from error
