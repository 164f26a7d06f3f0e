"""Adding clients to a run: before round 1, on resuming, and between rounds."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from flwr.serverapp import Grid
from pydantic import ConfigDict, TypeAdapter, ValidationError

from flexperts.communication.schema import refusal
from flexperts.config.federation import FederationConfig
from flexperts.config.names import alike, readings_of
from flexperts.errors import FederationError, FlexpertsError, incompatible
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.server.exchange import LazyGrid
from flexperts.server.membership import Introduction, Membership

_POLL = 1.0
"""Seconds between two checks of which nodes are online."""


def gather(grid: Grid, members: Membership, settings: FederationConfig, base: str = "") -> str:
    """Wait until enough clients are online, and turn away clients whose base is not the run's.

    Args:
        grid: The grid of nodes.
        members: Receives the clients.
        settings: The minimum number of clients, and the deadline in seconds.
        base: Fingerprint of the run's base; empty before round 1, where the run takes the most common base.

    Returns:
        The fingerprint of the run's base.
    """
    end = time.monotonic() + settings.deadline
    while True:
        members.look(grid, max(end - time.monotonic(), _POLL))
        bases = {name: members.told[name].base for name in members.arrived}
        common = base or most_common(bases)
        fitting = [name for name, its in bases.items() if its == common]
        # All nodes of a lazy grid are online from the start.
        if len(fitting) >= settings.min_clients or isinstance(grid, LazyGrid) or time.monotonic() >= end:
            break
        time.sleep(_POLL)
    for name in sorted(bases.keys() - set(fitting)):
        members.turn_away(name, str(other_base(members.told[name], common)))
    require(members, settings)
    return common


def require(members: Membership, settings: FederationConfig) -> None:
    """Refuse to continue with fewer clients than the recipe asks for."""
    if len(members.online) >= settings.min_clients:
        return
    refused = "".join(f"; refused: {who} ({reason})" for who, reason in members.refused)
    raise FederationError(
        f"{len(members.online)} clients have joined ({', '.join(members.online) or 'none'}{refused})",
        f"federation.min_clients = {settings.min_clients} must join within federation.deadline = "
        f"{settings.deadline:g} s",
        "start the other silos and resume the run",
    )


def most_common(bases: Mapping[str, str]) -> str:
    """Return the base that most clients have; with a tie, the one that was there first.

    Args:
        bases: Client -> base, in the order in which the clients came.
    """
    return max(Counter(bases.values()).items(), key=lambda pair: pair[1], default=("", 0))[0]


def found(method: Method, members: Membership, server: Server) -> None:
    """Make the online clients the clients of a new run, and make the method's agreement from their reports."""
    server.agreement, server.reports = _fitting(method, members)
    server.clients = {name: members.told[name].rows for name in server.reports}
    server.silos = {name: many for name in server.reports if (many := members.told[name].silos)}
    method.check_clients(server.clients)


def _fitting(method: Method, members: Membership) -> tuple[Any, dict[str, Any]]:
    """Return the agreement and its reports, by name; turn away clients whose report does not fit those of most."""
    for name in members.online:
        try:
            _check_type(method, members.told[name])
        except FlexpertsError as error:
            members.turn_away(name, str(error))
    told = {name: members.told[name].report for name in members.online}
    with suppress(FlexpertsError):  # nearly always all fit; comparing them one by one costs quadratic time
        return agreed(method, told), told
    groups: list[dict[str, Any]] = []
    for name in members.arrived:
        report = {name: told[name]}
        with suppress(FlexpertsError):
            agreed(method, report)
            home = next((group for group in groups if _fit(method, {**_first(group), **report})), None)
            if home is None:
                groups.append(home := {})
            home |= report
    kept = max(groups, key=len, default={})  # of two that are as large, the one that was there first
    reports: dict[str, Any] = {}
    for name in sorted(told, key=lambda name: (name not in kept, name)):
        try:
            agreed(method, {**reports, name: told[name]})
        except FlexpertsError as error:
            members.turn_away(name, str(error))
        else:
            reports[name] = told[name]
    reports = dict(sorted(reports.items()))
    return agreed(method, reports) if reports else None, reports


def _fit(method: Method, reports: Mapping[str, Any]) -> bool:
    with suppress(FlexpertsError):
        agreed(method, reports)
        return True
    return False


def _first(group: Mapping[str, Any]) -> dict[str, Any]:
    return dict([next(iter(group.items()))])


def check_report(method: Method, server: Server, client: str) -> None:
    """Refuse a client whose report does not fit the shared weights, or says not what the client will send."""
    try:
        method.check_report(server, client)
        method.uplink(server, client)
    except FlexpertsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise incompatible(f"{client}'s report", f"the method cannot use it ({error!r})") from error


def enrol_fitting(method: Method, server: Server, members: Membership, names: Iterable[str]) -> None:
    """Add clients that are online to a run that has begun; turn away those that do not fit.

    Args:
        method: The method.
        server: The run's state.
        members: The clients that are online.
        names: The clients to add, in the order in which they came.
    """
    for name in names:
        try:
            enrol(method, server, members.told[name])
        except FlexpertsError as error:
            members.turn_away(name, str(error))
        else:
            members.bind(name)


def enrol(method: Method, server: Server, one: Introduction) -> None:
    """Add a client to a run that has begun; a client that returns may have other rows or another report."""
    if server.base and one.base != server.base:
        raise other_base(one, server.base)
    known = server.clients.get(one.client), server.reports.get(one.client, ...), server.silos.get(one.client, 0)
    if known == (one.rows, one.report, one.silos):
        return
    if one.client not in server.clients and (other := alike(one.client, readings_of(server.clients))) is not None:
        raise FederationError(
            f"client {one.client!a}",
            f"the run has a client {other!a}, and two names must not look alike",
            "rename one of the two silos",
        )
    _check_type(method, one)
    clients = {**server.clients, one.client: one.rows}
    reports = {**server.reports, one.client: one.report}
    before = server.clients, server.reports, dict(server.memory)
    change_clients(method, server, clients, reports, "start a new run with it")
    try:
        check_report(method, server, one.client)
    except FlexpertsError:
        server.clients, server.reports, server.memory = before
        raise
    server.silos.pop(one.client, None)
    if one.silos:
        server.silos[one.client] = one.silos


def change_clients(
    method: Method, server: Server, clients: Mapping[str, int], reports: Mapping[str, Any], remedy: str
) -> None:
    """Replace a run's clients; if that is refused, the run keeps the clients it had.

    Args:
        method: The method.
        server: The run's state.
        clients: Client -> train rows, from now on.
        reports: Client -> its report, from now on.
        remedy: What the error tells the user to do.
    """
    same = clients.keys() == server.clients.keys()
    if same and reports == server.reports:
        server.clients = dict(sorted(clients.items()))  # a silo may come back with more rows
        return
    method.check_clients(clients)
    reports = dict(sorted(reports.items()))
    if _plain(agreed(method, reports)) != _plain(server.agreement):
        raise FederationError(
            "with these clients' reports, the method's agreement would be another one",
            "it is fixed before round 1",
            remedy,
        )
    server.clients, server.reports = dict(sorted(clients.items())), reports
    if not same:
        method.regroup(server)


def agreed(method: Method, reports: Mapping[str, Any]) -> Any:
    """Return the method's agreement on reports of its type, which may come from other machines."""
    try:
        return method.agree(reports)
    except FlexpertsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise incompatible("the client's report", f"the method cannot read it ({error!r})") from error


def _check_type(method: Method, one: Introduction) -> None:
    """Refuse a report that is not of the method's type."""
    try:
        _type_of(method.report_type).validate_python(one.report, strict=True)
    except ValidationError as error:
        said = refusal(error, one.client).rule
        raise incompatible(f"{one.client}'s report", f"the method cannot read it ({said})") from None


@lru_cache(64)
def _type_of(report_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(report_type, config=ConfigDict(allow_inf_nan=False))


def other_base(one: Introduction, base: str) -> FederationError:
    """Return the error for a client whose base is not the run's."""
    return FederationError(
        f"{one.client} has the base {one.base[:16]}",
        f"the run's base is {base[:16]}",
        "install the same base on every silo",
    )


def _plain(value: Any) -> Any:
    """Return a value as a checkpoint returns it (through JSON), so that it compares equal to a loaded one."""
    return json.loads(json.dumps(value))
