"""Taking clients into a run: before round 1, when it is resumed, and in its midst."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from flwr.serverapp import Grid

from flexperts.config.federation import FederationConfig
from flexperts.config.names import alike, readings_of
from flexperts.errors import FederationError, FlexpertsError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.server.exchange import LazyGrid
from flexperts.server.membership import Introduction, Membership

_POLL = 1.0
"""Seconds between two looks at who is online."""


def gather(grid: Grid, members: Membership, settings: FederationConfig, base: str = "") -> str:
    """Wait until enough clients are online, and turn away those with another base than the run's.

    Args:
        grid: Where the nodes are.
        members: Is filled.
        settings: How many are waited for, and how long.
        base: The run's base; empty where it has none yet, and takes the one that most clients have.

    Returns:
        The run's base.

    Raises:
        FederationError: Too few have joined when the time is over.
    """
    end = time.monotonic() + settings.deadline
    while True:
        members.look(grid, max(end - time.monotonic(), _POLL))
        bases = {name: members.told[name].base for name in members.online}
        common = base or most_common(bases)
        fitting = [name for name, its in bases.items() if its == common]
        # A lazy grid's nodes are all there from the start.
        if len(fitting) >= settings.min_clients or isinstance(grid, LazyGrid) or time.monotonic() >= end:
            break
        time.sleep(_POLL)
    for name in sorted(bases.keys() - set(fitting)):
        members.turn_away(name, str(other_base(members.told[name], common)))
    require(members, settings)
    return common


def require(members: Membership, settings: FederationConfig) -> None:
    """Refuse to go on with fewer clients than the recipe asks for.

    Raises:
        FederationError: They are fewer, or there is none; it names who joined and who was turned away.
    """
    if len(members.online) >= settings.min_clients:
        return
    refused = "".join(f"; refused: {who} ({reason})" for who, reason in members.refused)
    raise FederationError(
        f"{len(members.online)} clients have joined ({', '.join(members.online) or 'nobody'}{refused})",
        f"federation.min_clients = {settings.min_clients} must within federation.deadline {settings.deadline:g} s",
        "start the other silos and resume the run",
    )


def most_common(bases: Mapping[str, str]) -> str:
    """Return the base that most clients have; of several, the one of the first client by name."""
    counts = Counter(bases.values())
    return next((bases[name] for name in sorted(bases) if counts[bases[name]] == max(counts.values())), "")


def found(method: Method, members: Membership, server: Server) -> None:
    """Make the clients that are online those of a new run, and let the method settle on what they report.

    Raises:
        ConfigError: The method cannot run with these clients.
    """
    server.agreement, server.reports = _fitting(method, members)
    server.clients = {name: members.told[name].rows for name in server.reports}
    method.check_clients(server.clients)


def _fitting(method: Method, members: Membership) -> tuple[Any, dict[str, Any]]:
    """Return the agreement and the reports it is of; those that do not fit the ones before are turned away."""
    told = {name: members.told[name].report for name in members.online}
    with suppress(FlexpertsError):  # nearly always all fit; one after the other takes the square of their number
        return agreed(method, told), told
    agreement: Any = None
    reports: dict[str, Any] = {}
    for name, report in told.items():
        try:
            agreement = agreed(method, {**reports, name: report})
        except FlexpertsError as error:
            members.turn_away(name, str(error))
        else:
            reports[name] = report
    return agreement, reports


def enrol(method: Method, server: Server, one: Introduction) -> None:
    """Take a client into a run that has begun, or back into it.

    Raises:
        FlexpertsError: It has another base, or the method would have settled otherwise with it.
    """
    if server.base and one.base != server.base:
        raise other_base(one, server.base)
    if server.clients.get(one.client) == one.rows and server.reports.get(one.client, ...) == one.report:
        return
    if one.client not in server.clients and (other := alike(one.client, readings_of(server.clients))) is not None:
        raise FederationError(
            f"client {one.client!a}", f"the run has a client {other!a}, and two must not read alike", "rename one"
        )
    clients = {**server.clients, one.client: one.rows}
    reports = {**server.reports, one.client: one.report}
    change_clients(method, server, clients, reports, "start a new run with it")


def change_clients(
    method: Method, server: Server, clients: Mapping[str, int], reports: Mapping[str, Any], remedy: str
) -> None:
    """Give a run other clients than it had, or none of them.

    Args:
        method: The method.
        server: The run's state.
        clients: Client -> train rows, from now on.
        reports: Client -> what it reports, from now on.
        remedy: What to do where it cannot be.

    Raises:
        FlexpertsError: The method cannot run with these clients, or would have settled otherwise with them.
    """
    same = clients.keys() == server.clients.keys()
    if same and reports == server.reports:
        server.clients = dict(sorted(clients.items()))  # a silo may come back with more rows
        return
    method.check_clients(clients)
    reports = dict(sorted(reports.items()))
    if _plain(agreed(method, reports)) != _plain(server.agreement):
        raise FederationError(
            "what the clients report comes to another agreement",
            "the method has settled on its clients before round 1",
            remedy,
        )
    server.clients, server.reports = dict(sorted(clients.items())), reports
    if not same:
        method.regroup(server)


def agreed(method: Method, reports: Mapping[str, Any]) -> Any:
    """Return the method's agreement on reports of any origin.

    Raises:
        FlexpertsError: They do not fit together, or cannot be read.
    """
    try:
        return method.agree(reports)
    except FlexpertsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FederationError(
            "what it reports",
            f"the method cannot read it ({error!r})",
            "use one flexperts version and one recipe on every silo",
        ) from error


def other_base(one: Introduction, base: str) -> FederationError:
    """Return the refusal of a client whose base is not the run's."""
    return FederationError(
        f"{one.client} has the base {one.base[:16]}",
        f"the run's base is {base[:16]}",
        "install the same base on every silo",
    )


def _plain(value: Any) -> Any:
    """Return a value as it comes back from a checkpoint, to compare it with one that has."""
    return json.loads(json.dumps(value))
