"""Checks of a client's reply before it is used. Each refusal names the client and the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
from flwr.app import RecordDict

from flexperts.communication.average import check_finite
from flexperts.communication.messages import (
    DERIVED,
    Expected,
    Metrics,
    Update,
    check_records,
    fields_of,
    masked_of,
    metrics_of,
    payload_of,
)
from flexperts.communication.schema import (
    MEASURES,
    MOST,
    MOST_ROWS,
    ROOM,
    Heading,
    TrainedHeading,
    answer_counts,
    check_size,
    checked,
    measure_fields,
    score_fields,
)
from flexperts.communication.secure.fixed_point import FixedPoint, Ring
from flexperts.config.names import normal
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError, FlexpertsError, incompatible
from flexperts.evaluation.scores import REWARDS
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Payload, Vector, sizes_only
from flexperts.protection.pipeline import told

_BLOCK = 1 << 20


class Admission:
    """Checks of replies against what the server knows.

    Args:
        method: The method.
        config: The run.
        server: The state that the round starts from.
    """

    def __init__(self, method: Method, config: RunConfig, server: Server) -> None:
        self.method, self.config, self.server = method, config, server
        self._start: tuple[Vector | None, float] = None, 0.0

    def update(
        self, client: str, content: RecordDict, number: int | None = None, sent: Payload | None = None
    ) -> Update:
        """Return the update in a reply to a training request.

        Args:
            client: The client that was asked.
            content: Its reply.
            number: The round that it was asked for; by default the coming one.
            sent: The shared weights that it was sent; by default the present ones.
        """
        sent = sent or self.server.shared
        try:
            manifest = self.method.uplink(self.server, client)
            expected = Expected(manifest, sent, self.config.compression)
            check_size(content, expected.most, client)
            self._check_trained(client, content, number)
            return self._update(client, content, expected)
        except FederationError:
            raise
        except Exception as error:  # bytes from another machine: no fault in them may stop the round
            raise _unreadable(client, error) from error

    def masked(self, client: str, content: RecordDict, numbers: FixedPoint) -> tuple[Update, Ring]:
        """Return the measures in a reply to a training request with secure aggregation, and the masked update.

        Nothing can be checked of its values. The returned update has a payload of the right size without values.
        """
        try:
            manifest = self.server.shared.manifest
            check_size(content, numbers.dtype.itemsize * manifest.size + ROOM, client)
            self._check_trained(client, content)
            metrics = self._measures(client, content)
            values = masked_of(content, client, numbers.dtype, manifest.size)
            payload = Payload(manifest, sizes_only(manifest.size))
            return Update(client, payload, metrics["rows"], metrics), values
        except FederationError:
            raise
        except Exception as error:  # as above
            raise _unreadable(client, error) from error

    def scores(self, client: str, content: RecordDict, *, answers: bool) -> dict[str, float | int | None]:
        """Return the scores in a reply to an evaluation request of the finished round; None where not finite.

        Args:
            client: The client that was asked.
            content: Its reply.
            answers: Whether it was asked for answers; without them, scores of answers are not taken.
        """
        try:
            check_size(content, ROOM, client)
            check_records(content, client, "info", "metrics")
            metrics = metrics_of(content)
            pairs = self.config.training.objective == "dpo"
            schema = score_fields(self.method.states, answers=answers, pairs=pairs)
            known = checked(schema, metrics, client).model_dump()
            _check_heading(client, fields_of(content, Heading, client), self.server.round)
            payload_of(content, client).check(Payload.empty().manifest, client)
            self._check_scored(client, known, metrics)
            known["rows"] = int(known["rows"])
            always = ("rows", "nll", *REWARDS)
            taken = [name for name in metrics if answers or name.partition(".")[0] in always]
            return {name: None if _is_void(name, known) else known[name] for name in taken}
        except FederationError:
            raise
        except Exception as error:  # as above
            raise _unreadable(client, error) from error

    def _check_scored(self, client: str, known: Metrics, sent: Metrics) -> None:
        rows, most = known["rows"], self.config.evaluation.rows or MOST_ROWS
        most *= self.server.silos.get(client, 1)
        if not (1 <= rows <= most and rows.is_integer()):
            raise incompatible(
                f"{client}: {rows:.12g} rows", f"the number of scored rows must be a whole number from 1 to {most}"
            )
        counts = answer_counts(self.method.states)
        if (found := sum(name in sent for name in counts)) not in (0, len(counts)):
            raise incompatible(
                f"{client} reports {found} counts about answers", f"it must be all of {', '.join(counts)}, or none"
            )

    def _check_trained(self, client: str, content: RecordDict, number: int | None = None) -> None:
        check_records(content, client, "info", "metrics")
        heading = fields_of(content, TrainedHeading, client)
        _check_heading(client, heading, number or self.server.round + 1)
        self._check_base(client, heading.base)

    def _measures(self, client: str, content: RecordDict) -> dict[str, Any]:
        """Return a round's measures, without the count of personal bytes, which must be 0."""
        schema = measure_fields(tuple(told(self.config, MEASURES)))
        metrics = checked(schema, metrics_of(content), client).model_dump()
        self._check_rows(client, metrics["rows"])
        if metrics["personal_sent"] != 0:
            raise FederationError(
                f"{client}: {metrics['personal_sent']} personal bytes",
                "no personal byte is sent",
                "report this bug",
            )
        known = {name: value for name, value in metrics.items() if name != "personal_sent"}
        return known | {"rows": int(metrics["rows"])}

    def _update(self, client: str, content: RecordDict, expected: Expected) -> Update:
        metrics = self._measures(client, content)
        update = Update(client, payload_of(content, client, expected), metrics["rows"], metrics)
        self._check_values(update, expected.sent.vector)
        self.method.check_update(self.server, update)
        return update

    def _check_base(self, client: str, base: str) -> None:
        if self.server.base and base != self.server.base:
            raise FederationError(
                f"{client} trained the base {base[:16]}",
                f"the run's base is {self.server.base[:16]}",
                "install the same base on every silo",
            )

    def _check_rows(self, client: str, rows: float) -> None:
        rows_of = self.server.clients
        expected = sum(rows_of.values()) if self.method.pools_rows else rows_of[client]
        if client in self.server.silos and 1 <= rows <= expected:
            return  # some silos of a region may not take part
        if rows != expected or expected < 1:
            raise FederationError(
                f"{client} counts {rows:.12g} rows",
                f"on joining it reported {expected}",
                "restart that silo: it then joins with the rows that it has now",
            )

    def _check_values(self, update: Update, sent: Vector) -> None:
        """Refuse values that are not finite or too far from the sent ones (too large if not additive).

        A cheap bound comes first: the update's norm is at most the norm of the values plus the norm of the start.
        Nearly always this bound is small enough, and the exact float64 check is skipped.
        """
        allowed = self.config.federation.max_update_rms
        start = sent if self.method.additive and update.vector.size else None
        farthest = quick_norm(update.vector) + (0.0 if start is None else self._norm(start))
        if farthest < 0.99 * allowed * math.sqrt(update.vector.size):
            return
        check_finite(update)
        found = root_mean_square(update.vector, start)
        if not found <= allowed:
            raise FederationError(
                f"{update.client}: root mean square of the update {found:.3g}",
                f"it must be at most federation.max_update_rms = {allowed:g}",
                "lower training.lr on that silo",
            )

    def check_scaled(self, update: Update, sent: Payload, factor: float) -> None:
        """Refuse an update that is too far from the sent weights once its change is multiplied.

        Args:
            update: The update.
            sent: The shared weights that its client was sent.
            factor: The factor on its change.
        """
        allowed = self.config.federation.max_update_rms
        found = factor * root_mean_square(update.vector, sent.vector)
        if not found <= allowed:
            raise FederationError(
                f"{update.client}: root mean square of the update {found:.3g}, {factor:.3g} times what it sent "
                f"because it reports {update.metrics['shared_steps']} steps of the shared weights",
                f"it must be at most federation.max_update_rms = {allowed:g}",
                "look at that silo's log; if its steps are right, lower training.lr",
            )

    def sizes(self, update: Update, shared: Payload | None = None) -> dict[str, float]:
        """Return the root mean square of an update's change to what was sent: of parameters, of derived values.

        Parameters that were not sent are taken as they are; derived values that were not sent are left out. The
        result is empty if no limit needs it.

        Args:
            update: The update.
            shared: The shared weights that its client was sent; by default the present ones.
        """
        if self.config.federation.max_norm_ratio == "off":
            return {}
        if self.method.additive and update.vector.size:
            return {"parameters": root_mean_square(update.vector, (shared or self.server.shared).vector)}
        sent = self.method.broadcast(self.server, update.client).tensors()
        changes: dict[str, list[Vector]] = {"parameters": [], "derived values": []}
        for name, tensor in update.tensors().items():
            before = sent.get(name)
            if before is not None and before.shape == tensor.shape:
                tensor = tensor - before
            elif name.startswith(DERIVED):
                continue
            changes["derived values" if name.startswith(DERIVED) else "parameters"].append(tensor.numpy().ravel())
        return {kind: root_mean_square(np.concatenate(parts)) for kind, parts in changes.items() if parts}

    def too_large(self, sizes: Mapping[str, Mapping[str, float]]) -> dict[str, FederationError]:
        """Return the clients whose update is too large beside the round's median, with the error.

        Args:
            sizes: Client -> what ``sizes`` returned; of fewer than three, none is too large.
        """
        allowed, found = self.config.federation.max_norm_ratio, dict[str, FederationError]()
        if allowed == "off" or len(sizes) < 3:
            return found
        for kind in ("parameters", "derived values"):
            told = {client: its[kind] for client, its in sizes.items() if kind in its}
            middle = median(told.values()) if told else 0.0
            for client, size in told.items():
                if 0 < allowed * middle < size:
                    found[client] = FederationError(
                        f"{client}: root mean square of the update's {kind} {size:.3g}, {size / middle:.3g} times "
                        f"the round's median {middle:.3g}",
                        f"it must be at most federation.max_norm_ratio = {allowed:g} times",
                        "look at that silo's log; if its update is right, start a new run with a higher ratio",
                    )
        return found

    def _norm(self, start: Vector) -> float:
        """Return the norm of the weights that a round starts from, computed once."""
        if self._start[0] is not start:
            self._start = start, quick_norm(start)
        return self._start[1]


def quick_norm(values: Vector) -> float:
    """Return the L2 norm to 0.1 percent; it is not finite if a value is not, or if float32 overflows."""
    blocks = (values[first : first + _BLOCK] for first in range(0, values.size, _BLOCK))
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(sum(float(np.dot(block, block)) for block in blocks))


def leaked(content: RecordDict) -> int:
    """Return how many personal bytes a client reports to have found in its own reply."""
    found = metrics_of(content).get("personal_sent") if "metrics" in content.metric_records else None
    return min(found, MOST) if isinstance(found, int) and found > 0 else 0


def root_mean_square(values: Vector, start: Vector | None = None) -> float:
    """Return the root mean square of the values, or of their difference from ``start``; in float64."""
    total = 0.0
    for first in range(0, values.size, _BLOCK):
        block = values[first : first + _BLOCK].astype(np.float64)
        if start is not None:
            block -= start[first : first + _BLOCK]
        total += float(np.square(block, out=block).sum())
    return math.sqrt(total / max(1, values.size))


def _is_void(name: str, known: Metrics) -> bool:
    """Return whether a score is not finite, or is another score of a model state whose NLL is not finite."""
    kind, _, state = name.partition(".")
    return known[name] is None or (kind in ("rouge_l", *REWARDS) and known[f"nll.{state}"] is None)


def _check_heading(client: str, heading: Heading, number: int) -> None:
    if normal(heading.client) != client:
        raise FederationError(
            f"node of {client} answers as {heading.client}",
            "a node has one client name",
            "use one name in that silo's file and restart the silo",
        )
    if heading.round != number:
        raise FederationError(
            f"{client} answers to round {heading.round}",
            f"this is round {number}",
            "raise federation.deadline if silos are often late",
        )


def _unreadable(client: str, error: Exception) -> FederationError:
    said = str(error) if isinstance(error, FlexpertsError) else repr(error)
    return incompatible(f"{client}'s reply", f"it cannot be read ({said})")
