"""The server's part of secure aggregation in a run: the exchanges around a round, and the mean that comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from flexperts.communication.messages import check_records, fields_of, payload_of, records
from flexperts.communication.schema import LONGEST_TEXT, KeysFields, NoNumbers, check_size, checked
from flexperts.communication.secure.masks import SpoiltError
from flexperts.communication.secure.messages import Advertised, Agreed, AnyMessage, Card, Revealed, read
from flexperts.communication.secure.tally import Kept, Tally, new_session
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.names import normal
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError, incompatible, one_line
from flexperts.files import damaged
from flexperts.parameters.vector import Payload, Vector
from flexperts.protection.secure import rules_of
from flexperts.server.exchange import Asked, check_no_error, request, sendable
from flexperts.server.kept_round import keep_round, kept_round
from flexperts.server.membership import Membership
from flexperts.server.round_log import RoundLog

_SLACK = 1e-3
"""Share by which rounding may leave the norm of a mean above the clip."""
_NOISE = 10.0
"""Standard deviations by which the norm of noise may be above its mean."""
_Rows = Mapping[str, int]


class MaskedRounds:
    """The sessions of a run. Keys of a round come with the shares of the round before, where that is possible.

    Args:
        config: The run.
        members: The clients that are online, with the cards that they joined with.
    """

    def __init__(self, config: RunConfig, members: Membership) -> None:
        self._config, self._members = config, members
        self._next: Tally | None = None
        self.tally: Tally

    def begin(self, grid: Grid, rows: _Rows, log: RoundLog) -> None:
        """Have the keys of a round's clients; ask for them unless they have come with the round before.

        Args:
            grid: The grid of nodes.
            rows: Client that is online and takes part -> the rows that it counts for.
            log: The round's record.

        Raises:
            FederationError: Fewer clients than needed have sent keys.
        """
        log.secure = {"uplink": {}, "downlink": {}, "seconds": 0.0, "exchanges": 0}
        kept, self._next = self._next, None
        if kept is not None and kept.terms.round == log.number and self._fits(kept, rows, log):
            self.tally = kept
            return
        self.tally = tally = self._session(rows, log.number, log)
        asked = {name: {"setup": tally.setup(name).model_dump_json()} for name in tally.cards}
        for name, told in self._answers(grid, asked, log):
            self._take(log, name, Advertised, told.keys, tally.advertise)
        tally.check_ready()

    def keep(self, path: Path, log: RoundLog) -> None:
        """Write the masked sum before it is unmasked: silos give shares for one sum of a round only."""
        kept, total = self.tally.kept()
        values = torch.from_numpy(total.view(f"i{total.itemsize}").copy())
        keep_round(path, log, values, kept.model_dump_json())

    def resumed(self, path: Path, number: int) -> RoundLog | None:
        """Return the record of a round whose masked sum was written, to continue with it; None without."""
        if (found := kept_round(path, number)) is None:
            return None
        log, values, rest = found
        total = values.numpy()
        try:
            self.tally = Tally.of(Kept.model_validate_json(rest), total.view(f"<u{total.itemsize}"))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, f"its content is not valid: {error!r}") from error
        return log

    def mean(self, grid: Grid, rows_next: _Rows, log: RoundLog) -> Vector | None:
        """Return the mean of the updates that have arrived, by rows; the clients' shares unmask their sum.

        It is None if the sum cannot be that of clipped updates, or shares are wrong.

        Args:
            grid: The grid of nodes.
            rows_next: The clients of the next round, to ask for its keys; empty if there is none.
            log: The round's record.

        Raises:
            FederationError: Too few clients have stayed; the round can continue when they are back.
        """
        tally, upcoming = self.tally, None
        online = [name for name in tally.survivors if name in self._members.online]
        signatures = self._agreed(grid, online, log) if self._config.privacy.agreement else {}
        asked = {name: {"unmask": tally.unmask(name, signatures).model_dump_json()} for name in online}
        if len(rows_next) >= tally.least:
            upcoming = self._session(rows_next, log.number + 1, log)
            for name in upcoming.cards:
                asked.setdefault(name, {})["setup"] = upcoming.setup(name).model_dump_json()
        for name, told in self._answers(grid, asked, log):
            if name in tally.survivors:
                self._take(log, name, Revealed, told.shares, tally.reveal)
            if upcoming is not None and name in upcoming.cards:
                self._take(log, name, Advertised, told.keys, upcoming.advertise)
        self._next = upcoming
        try:
            total, faults = tally.total()
            for name, fault in faults.items():
                self._refuse(name, fault, log)
            change = tally.numbers.decode(total) / tally.weight
            log.secure["norm"] = float(np.linalg.norm(change))
            self._check_mean(log.secure["norm"], change.size)
        except SpoiltError as error:  # silos give no shares for another sum of this round
            log.secure["spoilt"] = one_line(str(error))
            self._members.observer.notice(f"round {log.number}: the shared weights stay as they were; {error}")
            for name in tally.survivors:
                log.withdraw(name)
            return None
        return np.asarray(change, dtype=np.float32)

    def _agreed(self, grid: Grid, survivors: Sequence[str], log: RoundLog) -> dict[str, str]:
        """Return the survivors' signatures of who they are."""
        found = dict[str, Agreed]()
        asked = {name: {"closed": self.tally.closed(name).model_dump_json()} for name in survivors}
        for name, told in self._answers(grid, asked, log):
            self._take(log, name, Agreed, told.agreed, found.__setitem__)
        return {name: its.signature for name, its in found.items()}

    def _check_mean(self, norm: float, size: int) -> None:
        """Refuse a mean that clipped updates cannot have: the only check of values that are never seen singly."""
        tally, privacy, most = self.tally, self._config.privacy, self._config.federation.max_update_rms
        clients = len(tally.survivors)
        rounding = size**0.5 * tally.numbers.step / 2 * clients / tally.weight
        # The norm of noise on so many values is nearly constant; with few, it can be a few times its mean.
        noise = tally.numbers.noise * (size**0.5 + _NOISE) * clients**0.5 / tally.weight
        if not norm <= privacy.clip * (1 + _SLACK) + rounding + noise:
            raise SpoiltError(
                FederationError(
                    f"the mean of the updates of {', '.join(tally.survivors)} has an L2 norm of {norm:.4g}",
                    f"updates are clipped to privacy.clip = {privacy.clip:g}; one of these silos has sent "
                    "something else, and no one can see which",
                    "look at the silos' logs, and leave out one that you do not trust",
                )
            )
        if not norm <= most * size**0.5 + noise:
            raise SpoiltError(
                FederationError(
                    f"the mean of the updates: root mean square {norm / size**0.5:.3g}",
                    f"it must be at most federation.max_update_rms = {most:g}",
                    "lower training.lr, or privacy.clip",
                )
            )

    def _session(self, rows: _Rows, number: int, log: RoundLog) -> Tally:
        """Return a new session of the clients that have joined with a card."""
        cards = dict[str, Card]()
        for name in sorted(rows):
            self._take(log, name, Card, self._members.told[name].card, cards.__setitem__)
        return Tally(new_session(self._members.run, number, cards, rows, rules_of(self._config.privacy)))

    def _fits(self, kept: Tally, rows: _Rows, log: RoundLog) -> bool:
        """Return whether a session has all clients of a round, as they are now, and enough of them are online."""
        known = {name: self._members.told[name].card for name in rows}
        return (
            all(name in kept.cards and kept.cards[name].model_dump_json() == card for name, card in known.items())
            and all(kept.rows[name] == its for name, its in rows.items())
            and len(set(kept.ready) & rows.keys()) >= kept.least
        )

    def _answers(
        self, grid: Grid, asks: Mapping[str, Mapping[str, str]], log: RoundLog
    ) -> Iterator[tuple[str, KeysFields]]:
        """Ask clients, yield their readable answers, and record bytes and seconds."""
        started, asked, waited = time.monotonic(), Asked(), set(asks)

        def messages() -> Iterator[Message]:
            for name in sorted(asks):
                content = records({"run": self._members.run, **asks[name]})
                _add(log.secure["downlink"], name, encoded_bytes(content))
                yield asked.note(request(content, "query.keys", self._members.node(name), str(log.number)))

        deadline = self._config.federation.deadline
        for reply in grid.send_and_receive(sendable(grid, messages()), timeout=deadline):
            name = self._members.nodes.get(asked.node(reply), "")
            if name not in waited:
                continue  # it was not asked, or has answered already
            waited.remove(name)
            try:
                told = _fields(name, reply)
            except FederationError as error:
                self._refuse(name, one_line(str(error)), log)
                continue
            _add(log.secure["uplink"], name, encoded_bytes(reply.content))
            yield name, told
        for name in sorted(waited):
            self._refuse(name, "it has sent no keys and shares in time", log)
        log.secure["seconds"] += time.monotonic() - started
        log.secure["exchanges"] += 1

    def _take(
        self, log: RoundLog, name: str, kind: type[AnyMessage], text: str, step: Callable[[str, AnyMessage], None]
    ) -> None:
        """Do a step with a client's message; one that is refused is that client's alone."""
        try:
            step(name, read(kind, text, name))
        except FederationError as error:
            self._refuse(name, one_line(str(error)), log)

    def _refuse(self, name: str, reason: str, log: RoundLog) -> None:
        if reason not in log.refused.get(name, ""):  # a silo that is down answers every exchange with it
            log.refuse(name, reason)
            self._members.observer.refused(name, reason)


def _fields(name: str, reply: Message) -> KeysFields:
    """Return an answer to a request for keys and shares."""
    check_no_error(name, reply)
    try:
        check_size(reply.content, 2 * LONGEST_TEXT, name)
        check_records(reply.content, name, "info", "metrics")
        checked(NoNumbers, reply.content.metric_records.get("metrics", {}), name)
        payload_of(reply.content, name).check(Payload.empty().manifest, name)
        told = fields_of(reply.content, KeysFields, name)
    except FederationError:
        raise
    except Exception as error:  # bytes from another machine
        raise incompatible(f"{name}'s keys and shares", f"they cannot be read ({error!r})") from error
    if normal(told.client) != name:
        raise incompatible(f"node of {name} answers as {told.client}", "a node has one client name")
    return told


def _add(sizes: dict[str, int], name: str, size: int) -> None:
    sizes[name] = sizes.get(name, 0) + size
