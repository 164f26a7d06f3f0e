"""The server's side of a round, as a Flower Strategy: broadcast, stream replies, evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import Update
from flexperts.communication.traffic import encoded_bytes
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError, one_line
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.protection.pipeline import EVERYONE, draws, is_secure, privacy_spent, reduced
from flexperts.seeding import drawn
from flexperts.server.admission import Admission, leaked
from flexperts.server.buffered_rounds import BufferedRounds
from flexperts.server.changes import Changes
from flexperts.server.checkpoint import save_server
from flexperts.server.downlink import Downlink
from flexperts.server.enrolment import enrol_fitting
from flexperts.server.exchange import Asked, LazyGrid, check_no_error, check_turn, is_unreachable, request, sendable
from flexperts.server.kept_round import keep_round, kept_round
from flexperts.server.masked_rounds import MaskedRounds
from flexperts.server.membership import Membership
from flexperts.server.round_log import RoundLog
from flexperts.server.start import check_start
from flexperts.server.summary import not_finite


class FlexpertsStrategy(Strategy):
    """Any ``Method`` as a Flower Strategy.

    Args:
        method: The method.
        config: The run.
        members: The clients that are online.
        server: The state that the rounds start from.
        run: The run directory that receives finished rounds.
        observer: Receives progress.
        finished: Rounds finished before the run was resumed.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        members: Membership,
        server: Server,
        run: RunDirectory,
        observer: Observer,
        finished: Sequence[RoundLog] = (),
    ) -> None:
        self.method, self.config, self.server = method, config, server
        self.members, self.run, self.observer = members, run, observer
        self.admission = Admission(method, config, server)
        self.masked = MaskedRounds(config, members)
        buffered = config.federation.mode == "buffered"
        self.buffered = BufferedRounds(config.federation, server, members) if buffered else None
        self.changes = Changes(config, server, self.buffered)
        self.downlink = Downlink(config.compression, server)
        self.rounds: list[RoundLog] = list(finished)
        self.rounds_total = method.total_rounds(config.federation.rounds)
        self._asked = Asked()
        self._noised: Update | None = None
        self._started = self._until = 0.0
        self._opened = time.monotonic() - sum(sum(log.seconds.values()) for log in finished)

    def seconds(self, setup: float) -> dict[str, float]:
        """Return wall time by phase and in all, without breaks; ``setup`` = seconds before this object was made."""
        phases = {phase: sum(log.seconds[phase] for log in self.rounds) for phase in ("training", "evaluation")}
        return {"setup": setup, **phases, "total": setup + time.monotonic() - self._opened}

    def begun(self, number: int) -> RoundLog:
        """Return the log of a round that begins."""
        return RoundLog(number, planned=self.config.federation.rounds, total=self.rounds_total)

    def summary(self) -> None:
        """Print nothing: the observer shows the run."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one request per participant that is online, sorted by client; no two share their records."""
        self._started = time.monotonic()
        log = self.begun(self.server.round + 1)
        kept = self._resumed(log.number)
        self.rounds.append(log := kept or log)
        self.observer.stage(f"round {log.number} of {self.rounds_total}")
        self._meet(grid, log)
        self._grid = grid
        if kept is not None or self.buffered is not None:  # its clients have trained, or aggregate_train asks
            return sendable(grid, iter(()))
        log.participants, self._asked = self._participants(log.number), Asked()
        log.missing = list(log.participants)
        asked = sorted(set(log.participants) & set(self.members.online))
        if self._masks():
            self.masked.begin(grid, self._masked_rows(asked, log), log)
        self.observer.phase("training", len(asked), log.number, self.rounds_total)
        return self._first_requests(self._train_requests(asked, log))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stream the usable replies through the method's rule into the server's next state.

        The rule asks for one update after the other, and each reply is read and recorded when its turn comes.
        """
        log, before = self.rounds[-1], self.server.shared
        if self.buffered is not None:
            replies = self._first_replies(self.buffered, log)
        replies = self._with_copies(replies, lambda names: self._train_requests(names, log, whole=True))
        if self._masks():
            self._aggregate_masked(replies, log)
        elif self._noised is not None:
            self.method.aggregate(self.server, [self._noised])
        else:
            self._aggregate(replies, log)
        if self.buffered is not None:
            self.buffered.close()
        elif isinstance(self._grid, LazyGrid):
            step = self.config.federation.seconds_of_step
            turns = (its.get("steps", 0) * step(name) for name, its in log.clients.items())
            self.server.clock += max(turns, default=0.0)
        log.clock = self.server.clock
        self.downlink.advance(before)
        self.server.round += 1
        log.privacy = privacy_spent(self.config, self._rounds_with_weights())
        log.seconds["training"] = time.monotonic() - self._started
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one request per client that is scored and online, in rounds that evaluate."""
        self._started, self._asked = time.monotonic(), Asked()
        self._grid = grid
        if not self.evaluates():
            return sendable(grid, iter(()))
        idle = set(self.members.online) - self._training()
        asked = sorted(set(self.config.evaluation.scored(self.server.clients)) & idle)
        self.observer.phase("evaluation", len(asked), self.server.round, self.rounds_total)
        return self._first_requests(self._evaluate_requests(asked))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' scores, and write the round and the checkpoint."""
        log = self.rounds[-1]
        replies = self._with_copies(replies, lambda names: self._evaluate_requests(names, whole=True))
        for client, reply in self._by_client(replies):
            self._score(client, reply, log)
        if self.evaluates():
            self._close_evaluation(log)
        log.seconds["evaluation"] = time.monotonic() - self._started
        self.run.append_round(vars(log))
        save_server(self.run.checkpoint, self.server)
        self._noised = None
        self._result.unlink(missing_ok=True)
        self.observer.round(vars(log))
        return None

    def _first_replies(self, buffered: BufferedRounds, log: RoundLog) -> list[Message]:
        """Ask clients that do not train yet, and return the replies that end the round."""
        asked, self._asked = buffered.ask(log.number, self.members.online), buffered.asked
        self.observer.phase("training", len(asked), log.number, self.rounds_total)
        replies = buffered.receive(self._grid, self._train_requests(asked, log), self._accepts)
        log.participants = sorted({*buffered.arrived, *buffered.overdue})
        log.missing = list(log.participants)
        log.late = {name: late for name in buffered.arrived if (late := log.number - buffered.sent(name)[0])}
        return replies

    def _meet(self, grid: Grid, log: RoundLog) -> None:
        """Update the members, and record who joined and left since the last round."""
        change = self.members.look(grid, self.config.federation.deadline)
        check_start(grid, self.members, self.server, change.joined, self.config.federation.deadline)
        joined = [name for name in self.members.arrived if name in change.joined]
        enrol_fitting(self.method, self.server, self.members, joined)
        log.left, log.joined = change.left, sorted(set(change.joined) & set(self.members.online))
        for word, names in (("gone", log.left), ("joining", log.joined)):
            if names:
                self.observer.stage(f"{word}: {', '.join(names)}")
        for who, reason in self.members.written_down():
            log.refuse(who, reason)

    def _rounds_with_weights(self) -> int:
        """Return in how many of the finished rounds clients sent weights."""
        sends, server = self.method.sends_weights(self.server), self.server
        return server.round if sends else min(server.round, self.config.federation.rounds)

    def _masks(self) -> bool:
        """Return whether the coming round's updates are masked."""
        return is_secure(self.config) and self.method.sends_weights(self.server)

    def _aggregate(self, replies: Iterable[Message], log: RoundLog) -> None:
        if self.config.training.local_seconds is not None:  # the steps of all decide what each counts
            replies = list(replies)
        updates = _unless_empty(self._updates(replies, log))
        if updates or not log.participants:  # otherwise no update came, and the quorum's error says why
            arrived: Iterable[Update] = updates or ()
            if self.method.sends_weights(self.server):
                arrived = reduced(self.config, self.server.shared, arrived)
                if draws(self.config):
                    self._check_quorum(log)
                    (noised,) = arrived
                    keep_round(self._result, log, torch.from_numpy(noised.vector), str(noised.rows))
            self.method.aggregate(self.server, arrived)
        self._check_quorum(log)

    def _aggregate_masked(self, replies: Iterable[Message], log: RoundLog) -> None:
        """Add up masked updates as they arrive, and give the method one update in their place."""
        for name, reply in self._by_client(replies):
            self._usable(name, reply, log)
        self._check_quorum(log)
        self.masked.keep(self._result, log)
        rows, capped = dict[str, int](), log.capped
        if log.number < self.config.federation.rounds:
            online = set(self._participants(log.number + 1)) & set(self.members.online)
            rows = self._masked_rows(online, log)
            log.capped = capped  # of this round, not of the next
        change, shared = self.masked.mean(self._grid, rows, log), self.server.shared
        if change is not None:
            mean = replace(shared, vector=shared.vector + change)
            self.method.aggregate(self.server, [Update(EVERYONE, mean, self.masked.tally.counted, {})])

    @property
    def _result(self) -> Path:
        """Where a result that must not be made twice is until the round is over."""
        name = "masked-sum" if is_secure(self.config) else "noised-mean"
        return self.run.checkpoint.with_name(f"{name}.safetensors")

    def _resumed(self, number: int) -> RoundLog | None:
        """Return the record of a round whose result was made before the run stopped; None without."""
        if self._masks():
            return self.masked.resumed(self._result, number)
        if (found := kept_round(self._result, number)) is None:
            return None
        log, values, rows = found
        self._noised = Update(EVERYONE, Payload(self.server.shared.manifest, values.numpy()), int(rows), {})
        return log

    def _masked_rows(self, names: Iterable[str], log: RoundLog) -> dict[str, int]:
        """Return the rows by which clients weight their masked updates; with noise, every client counts once."""
        noised = self.config.privacy.noise == "distributed"
        return dict.fromkeys(names, 1) if noised else self._counted(names, log)

    def _take_masked(self, name: str, content: RecordDict) -> Update:
        tally = self.masked.tally
        update, values = self.admission.masked(name, content, tally.numbers)
        tally.add(name, values)
        return update

    def _participants(self, number: int) -> list[str]:
        """Return the clients that train in a round, sorted; they are drawn online or not."""
        clients = self.server.clients
        sampled = drawn(clients, self.config.federation.drawn(len(clients)), self.config.seed, number)
        before = replace(self.server, round=number - 1)  # the round's number decides, also while another ends
        return sorted(self.method.participants(before, sampled))

    def _train_requests(self, names: Iterable[str], log: RoundLog, *, whole: bool = False) -> Iterator[Message]:
        for name in names:
            number, payload = self.changes.asked(name)
            if self.buffered is None:
                payload = self.method.broadcast(self.server, name)
            info = self._info(number)
            if self._masks():
                if name not in self.masked.tally.ready:
                    continue
                info |= {"masking": self.masked.tally.masking(name).model_dump_json()}
            content = self.downlink.content(info, payload, name, whole=whole)
            if number == log.number or not isinstance(self._grid, LazyGrid):  # a resumed simulation asks again
                before = log.downlink.get(name, 0) if whole else 0
                log.downlink[name] = before + encoded_bytes(content)
                log.declare("downlink", name, payload.manifest)
            yield self._asked.note(request(content, "train", self.members.node(name), str(number)))

    def _evaluate_requests(self, names: Iterable[str], *, whole: bool = False) -> Iterator[Message]:
        sent = self.rounds[-1].evaluation["downlink"]
        for name in names:
            info = self._info(self.server.round) | {"states": list(self.method.states), "answers": self._answers()}
            content = self.downlink.content(info, self.method.final(self.server, name), name, whole=whole)
            before = sent.get(name, 0) if whole else 0
            sent[name] = before + encoded_bytes(content)
            yield self._asked.note(request(content, "evaluate", self.members.node(name), str(self.server.round)))

    def _first_requests(self, messages: Iterator[Message]) -> Iterable[Message]:
        """Return an exchange's first requests; all of its replies come within the deadline, which begins now."""
        made = sendable(self._grid, messages)
        self._until = time.monotonic() + self.config.federation.deadline
        return made

    def _training(self) -> set[str]:
        """Return the clients that are online and cannot be scored now: they would answer after their training.

        What is trained after the last round is not used, so all are scored. Simulated evaluations take no time.
        """
        if self.buffered is None or isinstance(self._grid, LazyGrid) or self.server.round == self.rounds_total:
            return set()
        return self.server.flights.keys() & set(self.members.online)

    def evaluates(self) -> bool:
        """Return whether the round that was just trained is evaluated."""
        every = self.config.evaluation.every
        return self.server.round == self.rounds_total or bool(every and self.server.round % every == 0)

    def _answers(self) -> bool:
        """Return whether this round's evaluation generates answers."""
        return self.config.evaluation.answers == "always" or self.server.round == self.rounds_total

    def _info(self, number: int) -> dict[str, Any]:
        return {"run": self.members.run, "round": number, "agreement": json.dumps(self.server.agreement)}

    def _updates(self, replies: Iterable[Message], log: RoundLog) -> Iterator[Update]:
        """Yield the usable updates with the rows that they count for; each reply is recorded as it is read.

        Replies from other machines are a list. They are read twice, because an update is judged beside all others
        of its round, and all of them decoded may not fit in memory.
        """
        if isinstance(replies, list | tuple):
            usable = self._fitting(replies, log)
            rows, factors = self._scaled(usable, log)
            for name, reply in usable.items():
                moved = self.changes.moved(self._read(name, reply.content), factors[name])
                yield replace(moved, rows=rows[name])
            return
        for name, reply in self._by_client(replies):
            update = self._usable(name, reply, log)
            if update is not None:
                yield update
            del update  # before the next one arrives

    def _fitting(self, replies: Iterable[Message], log: RoundLog) -> dict[str, Message]:
        """Return the replies with updates that are usable, alone and beside each other."""
        usable: dict[str, Message] = {}
        sizes: dict[str, dict[str, float]] = {}
        for name, reply in self._by_client(replies):
            if (update := self._usable(name, reply, log)) is not None:
                usable[name], sizes[name] = reply, {}
                if not isinstance(self._grid, LazyGrid):
                    factor, (_, sent) = self.changes.factor(name, log), self.changes.asked(name)
                    sizes[name] = {k: factor * size for k, size in self.admission.sizes(update, sent).items()}
        self._withdraw(self.admission.too_large(sizes), usable, log)
        return usable

    def _scaled(self, usable: dict[str, Message], log: RoundLog) -> tuple[dict[str, int], dict[str, float]]:
        """Return the rows that each update counts for, and the factor on its change.

        Updates that are too large times their factor are taken out. The others' factors are different without them,
        so they are judged again.
        """
        while True:
            rows = self._counted(usable, log)
            factors, found = self.changes.factors(rows, log), dict[str, FederationError]()
            for name in (name for name, factor in factors.items() if factor > 1):
                (_, sent), update = self.changes.asked(name), self._read(name, usable[name].content)
                try:
                    self.admission.check_scaled(update, sent, factors[name])
                except FederationError as error:
                    found[name] = error
            if not found:
                return rows, factors
            self._withdraw(found, usable, log)

    def _withdraw(self, errors: Mapping[str, FederationError], usable: dict[str, Message], log: RoundLog) -> None:
        """Refuse updates that were usable by themselves."""
        for name, error in errors.items():
            log.withdraw(name)
            log.refuse(name, self._refused(name, error))
            del usable[name]

    def _read(self, name: str, content: RecordDict) -> Update:
        return self.admission.update(name, content, *self.changes.asked(name))

    def _accepts(self, name: str, reply: Message) -> bool:
        """Return whether an update can be used; nothing is recorded."""
        try:
            check_no_error(name, reply)
            self._read(name, reply.content)
        except FederationError:
            return False
        return True

    def _counted(self, names: Iterable[str], log: RoundLog) -> dict[str, int]:
        """Return the rows that each update counts for; record and name the clients that count for fewer."""
        has, share = self.server.clients, self.server.max_share
        if self.method.pools_rows:
            return dict.fromkeys(names, sum(has.values()))
        known = dict(self.server.counted)
        for region in self.server.silos.keys() & log.clients.keys():  # some of its silos may not have taken part
            has = {**has, region: int(log.clients[region]["rows"])}
            known[region] = min(known[region], has[region])
        rows = self.changes.capped({name: known[name] for name in names}, share, log.number)
        log.capped = {name: count for name, count in rows.items() if count < has[name]}
        for name, count in log.capped.items():
            self.observer.notice(
                f"{name} reports {has[name]} rows and counts for {count}: no silo has more than "
                f"federation.max_share = {share:g} of the mean"
            )
        return rows

    def _usable(self, name: str, reply: Message, log: RoundLog) -> Update | None:
        """Return a reply's update and record its measures; if it is refused, record why and return None.

        A client that cannot be reached has sent nothing, and stays missing.
        """
        if is_unreachable(reply) and name in log.missing:
            self.observer.notice(f"round {log.number}: {name} cannot be reached")
            return None
        if name in log.missing:
            log.missing.remove(name)
        try:
            check_turn(name, reply, log.participants, log.clients)
            log.personal_sent += leaked(reply.content)
            read = self._take_masked if self._masks() else self._read
            update = read(name, reply.content)
        except FederationError as error:
            log.refuse(name, self._refused(name, error))
            return None
        log.uplink[name] = encoded_bytes(reply.content)
        log.declare("uplink", name, update.payload.manifest)
        log.clients[name] = dict(update.metrics)
        return update

    def _score(self, name: str, reply: Message, log: RoundLog) -> None:
        """Record a reply's scores, or why there are none."""
        try:
            check_turn(name, reply, log.evaluation["downlink"], log.scores)
            log.score(name, self.admission.scores(name, reply.content, answers=self._answers()))
            log.evaluation["uplink"][name] = encoded_bytes(reply.content)
            for state, reason in not_finite(log.scores[name]).items():
                self.observer.notice(f"{name}, {state}: no score; {reason}")
        except FederationError as error:
            log.unscored[name] = self._refused(name, error)

    def _refused(self, name: str, error: FederationError) -> str:
        reason = one_line(str(error))
        self.observer.refused(name, reason)
        return reason

    def _check_quorum(self, log: RoundLog) -> None:
        if not (self.buffered is not None and self.buffered.full and log.clients):
            log.check_quorum(self.config.federation.quorum)

    def _close_evaluation(self, log: RoundLog) -> None:
        """Record the clients without scores; after the last round at least one client must have them."""
        log.close_evaluation(self.config.evaluation.scored(self.server.clients), self._training())
        if self.server.round == self.rounds_total and not log.scores:
            raise FederationError(
                f"round {log.number}: no client has scores "
                f"({', '.join(f'{name}: {reason}' for name, reason in log.unscored.items())})",
                "the last evaluation needs at least one",
                "resume the run when the clients are back: it repeats the last round",
            )

    def _with_copies(
        self, replies: Iterable[Message], again: Callable[[Iterable[str]], Iterator[Message]]
    ) -> Iterable[Message]:
        """Return the replies, after clients without the version that their request changes have got all weights.

        Args:
            replies: The replies to an exchange.
            again: Makes requests to clients with all weights.
        """
        if self.server.versions is None:
            return replies

        def send(lacking: list[str]) -> Iterable[Message]:
            self.observer.stage(f"all weights again: {', '.join(lacking)}")
            messages, left = sendable(self._grid, again(lacking)), max(0.0, self._until - time.monotonic())
            return self._grid.send_and_receive(messages, timeout=left)

        complete = self.downlink.completed(iter(replies), self._client, send)
        return list(complete) if isinstance(replies, list | tuple) else complete

    def _by_client(self, replies: Iterable[Message]) -> Iterable[tuple[str, Message]]:
        """Return replies with their clients, sorted by name; a lazy grid's replies are already in that order."""
        found = ((self._client(reply), reply) for reply in replies)
        return sorted(found, key=lambda pair: pair[0]) if isinstance(replies, list | tuple) else found

    def _client(self, reply: Message) -> str:
        node = self._asked.node(reply)
        return self.members.nodes.get(node, f"node {node}")


def _unless_empty(updates: Iterator[Update]) -> Iterator[Update] | None:
    """Return the same updates, or None if there are none; the first one is read here."""
    for first in updates:
        return chain(iter([first]), updates)  # chain would keep a list, and with it the first update, in memory
    return None
