"""A silo's ledger: what it has released, over all runs on its rows. It outlives the folders of the runs.

A round's update is released once: an equal request gets the stored reply, byte for byte, and any other request for
that round is refused. A release is on disk before the reply leaves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flexperts.client.request import Request
from flexperts.config.federation import PrivacyConfig
from flexperts.config.silo import SiloPolicy
from flexperts.data.rows import Row
from flexperts.deployment.policy import refusal
from flexperts.deployment.state import replies_folder
from flexperts.errors import PolicyError
from flexperts.files import damaged, opened, read_json, sealed, unwritable, write_bytes, write_json
from flexperts.parameters.vector import vector_hash
from flexperts.protection.noise import accounted_multiplier, gaussian_epsilon

_HASH = 16
"""Hex digits of a row's hash."""


@dataclass(frozen=True)
class Spent:
    """What one run has received from the silo.

    Args:
        method: The run's method.
        round: Last round in which the silo trained.
        bare: Rounds whose update was sent without local noise.
        noised: Sum of 1 / multiplier^2 over the other rounds, with noise over sensitivity as multiplier.
        evaluations: Evaluations that were answered.
        answered: Kind of request -> SHA-256 of the last request and of its reply.
    """

    method: str
    round: int = 0
    bare: int = 0
    noised: float = 0.0
    evaluations: int = 0
    answered: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Content:
    runs: dict[str, Spent] = field(default_factory=dict)
    scored: list[list[str]] = field(default_factory=list)
    """Hashes of the scored rows, in the smallest groups that the scores so far can tell apart."""


@dataclass(frozen=True)
class Asked:
    """A request whose answer is a release.

    Args:
        run: The run's id.
        kind: train or evaluate.
        round: The round.
        request: SHA-256 of what decides the answer: round, weights, and states and answers of an evaluation.
    """

    run: str
    kind: str
    round: int
    request: str

    @classmethod
    def of(cls, run: str, kind: str, request: Request, *options: object) -> Asked:
        """Return a request of a run, with the options of an evaluation."""
        parts = (request.round, request.payload.manifest.to_json(), vector_hash(request.payload.vector), options)
        return cls(run, kind, request.round, _sha256(json.dumps(parts).encode()))


class Ledger:
    """The ledger of a state folder. Only one process may write it; `silo serve` locks the folder.

    Args:
        state: The state folder.
        policy: The silo's policy.
    """

    def __init__(self, state: Path, policy: SiloPolicy) -> None:
        self.state, self.policy, self._path = state, policy, state / "ledger.json"
        self._content = _read(self._path) if self._path.exists() else _Content()

    @property
    def runs(self) -> dict[str, Spent]:
        """What each run has received, by id."""
        return self._content.runs

    def epsilon(self, *runs: Spent) -> float:
        """Return the epsilon that these runs have spent together; infinite after an update without local noise."""
        total = sum(spent.noised for spent in runs)
        if any(spent.bare for spent in runs) or not math.isfinite(total):
            return math.inf
        return gaussian_epsilon(1 / math.sqrt(total), self.policy.delta) if total else 0.0

    def join(self, run: str, method: str) -> None:
        """Enter a run, or refuse it if there are too many."""
        if run in self.runs:
            return
        if self.policy.max_runs is not None and len(self.runs) >= self.policy.max_runs:
            raise refusal(self.policy, "max_runs", f"run {run}")
        self._write(run, Spent(method), self._content.scored)

    def reply_to(self, asked: Asked, privacy: PrivacyConfig) -> bytes | None:
        """Return the reply to an equal request before, or None if this one may be answered.

        Args:
            asked: The request.
            privacy: The recipe's section.
        """
        spent = self.runs[asked.run]
        request, reply = spent.answered.get(asked.kind, ("", ""))
        place = self._reply(asked)
        if request == asked.request and place.exists() and _sha256(stored := place.read_bytes()) == reply:
            return stored
        first = spent.round + 1 if asked.kind == "train" else spent.round
        if asked.round < first:
            raise PolicyError(
                f"another request to {asked.kind} in round {asked.round}, after round {spent.round}",
                "a silo answers each round once, and a repeated request with the same bytes",
                "resume the run from the directory that the server used before, or start a new run",
            )
        most = self.policy.max_evaluations
        if asked.kind == "evaluate" and most is not None and spent.evaluations >= most:
            raise refusal(self.policy, "max_evaluations", f"evaluation {most + 1}")
        if asked.kind == "train" and self.policy.max_epsilon is not None:
            others = [its for run, its in self.runs.items() if run != asked.run]
            after = self.epsilon(*others, self._trained(spent, asked.round, privacy))
            if after > self.policy.max_epsilon:
                raise refusal(self.policy, "max_epsilon", f"epsilon {after:.4g} after round {asked.round}")
        return None

    def check_scored(self, rows: Sequence[Row]) -> None:
        """Refuse scores that stand for too few rows, alone or combined with scores that were sent before."""
        for group in self._regrouped(rows):
            texts = {one[:_HASH] for one in group}  # equal rows count as one
            if group not in self._content.scored and len(texts) < self.policy.min_score_rows:
                raise refusal(self.policy, "min_score_rows", f"{len(rows)} rows, {len(texts)} of them separately")

    def record(self, asked: Asked, reply: bytes, privacy: PrivacyConfig, scored: Sequence[Row] = ()) -> None:
        """Write a release to disk, with its reply.

        Args:
            asked: The request.
            reply: The reply, which must not leave before this returns.
            privacy: The recipe's section.
            scored: The rows of an evaluation.
        """
        spent = self.runs[asked.run]
        if asked.kind == "train":
            spent = self._trained(spent, asked.round, privacy)
        else:
            spent = replace(spent, evaluations=spent.evaluations + 1)
        answered = {**spent.answered, asked.kind: (asked.request, _sha256(reply))}
        # In this order: a reply that is not in the ledger is never sent.
        write_bytes(self._reply(asked), reply)
        self._write(asked.run, replace(spent, answered=answered), self._regrouped(scored))

    def _regrouped(self, rows: Iterable[Row]) -> list[list[str]]:
        """Return the groups of scored rows after scores on these rows."""
        groups = _groups([set(group) for group in self._content.scored], _hashes(rows))
        return [sorted(group) for group in groups]

    def _trained(self, spent: Spent, number: int, privacy: PrivacyConfig) -> Spent:
        """Return what a run has received after one more round."""
        multiplier = accounted_multiplier(privacy)
        if privacy.noise == "local" and math.isfinite(gaussian_epsilon(multiplier, self.policy.delta)):
            return replace(spent, round=number, noised=spent.noised + multiplier**-2)
        return replace(spent, round=number, bare=spent.bare + 1)

    def _reply(self, asked: Asked) -> Path:
        return replies_folder(self.state, asked.run) / f"{asked.kind}.safetensors"

    def _write(self, run: str, spent: Spent, scored: list[list[str]]) -> None:
        content = _Content({**self.runs, run: spent}, scored)
        write_json(self._path, sealed(asdict(content)), indent=None)
        try:
            folder = os.open(self.state, os.O_RDONLY)
            try:
                os.fsync(folder)  # else a power failure could bring the file before this one back
            finally:
                os.close(folder)
        except OSError as error:
            raise unwritable(self._path, error) from error
        self._content = content


def _read(path: Path) -> _Content:
    try:
        return _CONTENT.validate_python(opened(path, read_json(path), needed=True))
    except ValidationError as error:
        raise damaged(path, f"its content is not valid: {error.errors()[0]['loc']}") from error


_CONTENT = TypeAdapter(_Content)


def _groups(groups: Sequence[set[str]], scored: set[str]) -> list[set[str]]:
    """Return the smallest groups of rows that scores can tell apart, after scores on more rows."""
    parts = [part for group in groups for part in (group & scored, group - scored)]
    return [part for part in (*parts, scored.difference(*groups)) if part]


def _hashes(rows: Iterable[Row]) -> set[str]:
    """Return a hash of every row's content; repetitions of a row get a number."""
    found = Counter[str]()
    hashes = set()
    for row in rows:
        text = json.dumps([row.instruction, row.context, row.response, *([row.rejected] if row.rejected else [])])
        digest = _sha256(text.encode())[:_HASH]
        found[digest] += 1
        hashes.add(f"{digest}.{found[digest]}")
    return hashes


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
