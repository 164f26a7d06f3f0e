"""A region: a federation of its own whose result is one client of another federation, the root's.

The mean by rows is exact in stages: the root averages what its regions send by the rows behind it. To the root a
region is a client; to its silos it is the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import check_records, fields_of, payload_of, records
from flexperts.communication.schema import MEASURES, MOST_ROWS, EvaluateRequest, InitialQuery, Query, TrainRequest
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError, FederationError
from flexperts.files import opened, read_json, sealed, write_json
from flexperts.methods.kit.method import Method
from flexperts.methods.registry import make_method
from flexperts.observer import Observer, Once
from flexperts.protection.pipeline import check_apart, check_plain, checked_method, told
from flexperts.server.checkpoint import save_server
from flexperts.server.membership import Membership
from flexperts.server.round_log import RoundLog
from flexperts.server.serve import finish, joined
from flexperts.server.strategy import FlexpertsStrategy

_ROOT = "the root"
_SAME = ("seed", "model", "lora", "graft", "method", "training", "compression", "evaluation")
"""Sections of a recipe that a region shares with its root."""
_OF_EVALUATION = ("scores", "answers", "unscored", "evaluation")
"""What an evaluation adds to a round's record."""
_SUMS = ("longer_references", "cut")


def check_region(config: RunConfig) -> None:
    """Refuse what cannot be averaged in stages, before any silo is asked.

    Args:
        config: The region's recipe.
    """
    method = checked_method(config)
    check_plain(method, config, "a region")
    if method.report_type is not None:
        raise ConfigError(
            f"a region with method {method.name!r}",
            "clients of this method agree on something from all reports, and a region has one",
            "use a method such as 'fedavg' or 'flex'",
        )
    others = {
        f"privacy.noise = {config.privacy.noise!r}": config.privacy.noise not in ("none", "local"),
        f"compression.kind = {config.compression.kind!r}": config.compression.kind != "none",
        f"compression.downlink = {config.compression.downlink!r}": config.compression.downlink != "none",
        "federation.mode = 'buffered'": config.federation.mode == "buffered",
        f"evaluation.clients = {config.evaluation.clients}": config.evaluation.clients is not None,
        # Changes count per step, times the mean number of steps of all silos, which no region knows.
        f"training.local_seconds = {config.training.local_seconds}": config.training.local_seconds is not None,
    }
    if other := next((name for name, active in others.items() if active), None):
        rule = (
            "the root's rounds are the region's, in fp32 and by rows, and it ends with the root's last evaluation"
        )
        raise ConfigError(f"a region with {other}", rule, "leave it out")


class Region:
    """Answers the root's requests by rounds of its own silos; the constructor waits for the silos.

    Args:
        name: The region's name at the root.
        grid: Where its silos are.
        config: The run; sections other than those of rounds and privacy are the root's.
        run: The region's run directory.
        observer: Receives progress.
    """

    def __init__(self, name: str, grid: Grid, config: RunConfig, run: RunDirectory, observer: Observer) -> None:
        check_region(config)
        check_apart(config)
        self.name, self.grid, self.config, self.run = name, grid, config, run
        started, method, observer = time.monotonic(), _averaging(make_method(config.method)), Once(observer)
        members = Membership(observer, run.run_id)
        self.server, self.initial = joined(grid, config, run, method, members)
        self._setup = time.monotonic() - started
        finished = [RoundLog(**record) for record in run.keep_rounds(self.server.round)]
        save_server(run.checkpoint, self.server)
        self.strategy = FlexpertsStrategy(method, config, members, self.server, run, observer, finished)
        self._told = run.path / "region" / "told.json"

    @property
    def finished(self) -> bool:
        """Whether the last round has been evaluated."""
        return self.run.has_finished

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the reply to a request of the root; after one to train, ``settle`` ends the round.

        Args:
            kind: Flower's message type.
            content: The request's content.

        Raises:
            FederationError: The request does not fit the region's recipe or state, or too few silos answered.
        """
        answers: Mapping[str, Callable[[RecordDict], RecordDict]] = {
            "query.join": self._join,
            "query.initial": self._initial,
            "train": self._train,
            "evaluate": self._evaluate,
        }
        if kind not in answers:
            raise FederationError(
                f"a request {kind[:80]!r}",
                f"a region answers {', '.join(answers)}",
                "with secure aggregation, set it in the regions' recipes and not in the root's",
            )
        check_records(content, _ROOT, "info")
        return answers[kind](content)

    def settle(self) -> None:
        """Write down the round that was trained; called when its reply is kept, because it cannot be made again."""
        number = self.server.round
        if self.run.written_rounds() >= number:
            return
        if self.strategy.evaluates():
            self._catch_up(number)  # its scores follow
        else:
            self.strategy.configure_evaluate(number, ArrayRecord(), ConfigRecord(), self.grid)
            self.strategy.aggregate_evaluate(number, [])

    def _join(self, content: RecordDict) -> RecordDict:
        fields_of(content, Query, _ROOT)
        write_json(self._told, sealed(behind := self._behind()))
        return records({"client": self.name, "base": self.server.base, "report": "null", **behind}, {})

    def _behind(self) -> dict[str, int]:
        """Return the train rows that the silos count for, and the number of silos; no more than a root accepts."""
        silos = sum(self.server.silos.get(name, 1) for name in self.server.clients)
        return {"train_rows": min(sum(self.server.counted.values()), MOST_ROWS), "silos": min(silos, MOST_ROWS)}

    def _known(self) -> dict[str, int]:
        """Return the same as the root knows it: as it was when the root asked, perhaps before this process."""
        return opened(self._told, read_json(self._told), needed=True) if self._told.exists() else self._behind()

    def _initial(self, content: RecordDict) -> RecordDict:
        asked = fields_of(content, InitialQuery, _ROOT)
        texts = {"client": self.name, "split": self.initial.text, "digest": self.initial.digest}
        return records(texts, {}, self.initial.payload if asked.weights else None)

    def _train(self, content: RecordDict) -> RecordDict:
        """Run one round on the root's weights, and send the mean of the silos' weights with their rows."""
        asked, strategy = fields_of(content, TrainRequest, _ROOT), self.strategy
        self._check_round(asked.round, self.server.round + 1)
        weights = self._weights(content)
        self._catch_up(asked.round - 1)
        del strategy.rounds[asked.round - 1 :]  # it has failed before
        self.server.shared = weights
        replies = self.grid.send_and_receive(
            strategy.configure_train(asked.round, ArrayRecord(), ConfigRecord(), self.grid),
            timeout=self.config.federation.deadline,
        )
        log = strategy.rounds[-1]
        try:
            strategy.aggregate_train(asked.round, replies)
        except Exception:  # the root gets no mean
            for name in list(log.clients):
                log.withdraw(name)
            raise
        if spoilt := log.secure.get("spoilt"):
            raise FederationError(f"{self.name}, round {asked.round}", spoilt, "see the region's log")
        heading = {"client": self.name, "round": asked.round, "base": self.server.base}
        return records(heading, self._measures(log), self.server.shared)

    def _evaluate(self, content: RecordDict) -> RecordDict:
        """Have the silos score the root's weights, and send the means of their scores by rows."""
        asked, strategy = fields_of(content, EvaluateRequest, _ROOT), self.strategy
        self._check_round(asked.round, self.server.round)
        weights, rounds, fresh = self._weights(content), strategy.rounds, strategy.begun(asked.round)
        if self.server.round < asked.round:  # the region was not drawn, or did not train
            self._catch_up(asked.round - 1)
            if len(rounds) < asked.round:
                rounds.append(fresh)
            self.server.round = asked.round
        del rounds[asked.round :]  # a later one that has failed
        rounds[-1] = replace(rounds[-1], **{name: getattr(fresh, name) for name in _OF_EVALUATION})
        self.server.shared = weights
        replies = self.grid.send_and_receive(
            strategy.configure_evaluate(asked.round, ArrayRecord(), ConfigRecord(), self.grid),
            timeout=self.config.federation.deadline,
        )
        strategy.aggregate_evaluate(asked.round, replies)
        if self.run.written_rounds() > asked.round:  # its line has no scores yet, or those of other weights
            self.run.write_rounds(map(vars, rounds))
        if asked.round == strategy.rounds_total:
            finish(self.config, self.run, strategy, self._setup, self.initial.size)
        log, most = rounds[-1], (self.config.evaluation.rows or MOST_ROWS) * self._known()["silos"]
        return records({"client": self.name, "round": asked.round}, _scores(log.scores, log.answers, most))

    def _check_round(self, number: int, first: int) -> None:
        """Refuse a round that the run does not have, or that is over; one far ahead would end the region's run."""
        last = self.strategy.rounds_total
        if not max(1, first) <= number <= last:
            raise FederationError(
                f"round {number}",
                f"the run has rounds 1 to {last}, and {self.server.round} of them are over in the region",
                "resume the root from its own run directory",
            )

    def _catch_up(self, until: int) -> None:
        """Write the rounds up to a number: one that was not evaluated, empty ones where the root did not ask."""
        rounds = self.strategy.rounds
        for number in range(self.run.written_rounds() + 1, until + 1):
            if number > len(rounds):
                rounds.append(self.strategy.begun(number))
            self.run.append_round(vars(rounds[number - 1]))
        self.server.round = max(until, self.server.round)
        save_server(self.run.checkpoint, self.server)

    def _weights(self, content: RecordDict) -> Any:
        payload = payload_of(content, _ROOT)
        return payload.check(self.server.shared.manifest, _ROOT)

    def _measures(self, log: RoundLog) -> dict[str, float | int]:
        """Return a round's measures as those of one client: sums, the mean loss by rows, the most steps.

        The rows are those that the silos counted for, so that the others of its region do not get a capped one's.
        """
        clients = [its | {"rows": log.capped.get(name, its["rows"])} for name, its in log.clients.items()]
        rows = sum(int(its["rows"]) for its in clients)
        found: dict[str, float | int] = {}
        for name in clients[0]:
            values = [its[name] for its in clients]
            if name == "loss":
                found[name] = sum(value * its["rows"] for value, its in zip(values, clients, strict=True)) / rows
            elif name in ("steps", "shared_parameters"):
                found[name] = max(values)
            else:
                found[name] = sum(values)
        # Silos that have joined since have more rows than the root knows of.
        return found | {"rows": min(rows, self._known()["train_rows"]), "personal_sent": log.personal_sent}


def check_same(root: RunConfig, own: RunConfig) -> None:
    """Refuse a root whose recipe is another one, but for rounds, rows and privacy, or that waits too short a time.

    Args:
        root: The recipe that came with a request.
        own: The region's recipe.
    """
    theirs, ours = root.model_dump(mode="json"), own.model_dump(mode="json")
    differ = [name for name in _SAME if theirs[name] != ours[name]]
    differ += ["federation.rounds"] if root.federation.rounds != own.federation.rounds else []
    if told(root, MEASURES) != told(own, MEASURES):
        differ.append("the measures that privacy.noise and [protections] hide")
    if differ:
        raise FederationError(
            f"the root's recipe differs from the region's in {', '.join(differ)}",
            "these must be the same in all regions",
            "submit the region's run with the root's recipe",
        )
    most = root.federation.deadline / 2
    if own.federation.deadline > most:
        raise FederationError(
            f"federation.deadline = {own.federation.deadline:g} in a region, {2 * most:g} at its root",
            "a region waits at most half as long, or one slow silo makes all of it late at the root",
            f"submit the region's run again, to another --out, with --set federation.deadline={most:g}",
        )


def _averaging(method: Method) -> Method:
    """Return the method with the plain mean by rows in the place of its server's rule, which is the root's."""
    own = type(type(method).__name__, (type(method),), {"aggregate": Method.aggregate, "step": Method.step})
    return own(method.options)  # type: ignore[no-any-return]


def _scores(
    scores: Mapping[str, Mapping[str, float | int | None]],
    answers: Mapping[str, Mapping[str, float | int | None]],
    most: int,
) -> dict[str, float | int]:
    """Return silos' scores as those of one client: means by rows, NaN if one is not finite; counts added up.

    Args:
        scores: Silo -> its scores.
        answers: Silo -> its counts about answers.
        most: Rows that the root accepts.
    """
    if not scores:
        raise FederationError("an evaluation", "no silo of the region has scores", "see the region's log")
    rows = {name: int(its["rows"] or 0) for name, its in scores.items()}
    total = sum(rows.values())
    found: dict[str, float | int] = {"rows": min(total, most)}
    for kind in next(iter(scores.values())):
        if kind != "rows" and all(kind in its for its in scores.values()):
            values = {name: its[kind] for name, its in scores.items()}
            finite = all(value is not None for value in values.values())
            mean = sum(rows[name] * (value or 0) for name, value in values.items()) / total
            found[kind] = mean if finite else float("nan")
    for name in next(iter(answers.values()), {}):
        counts = [int(its[name] or 0) for its in answers.values()]
        found[name] = sum(counts) if name.partition(".")[0] in _SUMS else max(counts)
    return found
