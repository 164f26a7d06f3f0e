"""One client: it joins, trains a round, evaluates; and all clients of a process. Nothing here knows Flower."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from flexperts.client.answer_limit import answer_limit, longer_references, scored_rows
from flexperts.client.floor import choose, deciding, record_of
from flexperts.client.masking import Masked, Standing
from flexperts.client.model import ClientModel
from flexperts.client.request import Request, Trained
from flexperts.client.routing_log import prompt_batches, routing_lines, write_routing
from flexperts.client.settled import Settled
from flexperts.client.states import InState, in_states
from flexperts.client.workspace import CLIENTS_KEPT, TrainRows, Workspace
from flexperts.communication.messages import Update, encode
from flexperts.config.run import RunConfig
from flexperts.data.clients import rows_hash
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.rows import ClientRows, Row
from flexperts.errors import FederationError
from flexperts.evaluation.scores import EvaluationSettings, Scores, evaluate
from flexperts.files import json_text, sealed, write_json, write_text
from flexperts.methods.kit.candidates import candidates_of
from flexperts.methods.kit.method import OnBatch, State
from flexperts.methods.kit.turn import Prepared, Turn
from flexperts.methods.registry import make_method
from flexperts.modeling.repeatable import repeatable
from flexperts.observer import Observer, Phase, TurnState, current_observer
from flexperts.parameters.store import MOMENTS, PersonalMeta, PersonalStore
from flexperts.parameters.vector import Payload, vector_hash
from flexperts.parts.grafts import GATES
from flexperts.protection.pipeline import is_secure, protect, told
from flexperts.seeding import generator, seeded
from flexperts.training.local import LocalSettings
from flexperts.training.preferences import DirectPreference

_MEMORY = "memory."
_State = TypeVar("_State", bound=str)
_NEWEST = sys.maxsize
"""Every stored state, also a resumed run's newest, holds what was decided before any training."""


class Client:
    """One silo's side of the federation.

    Args:
        name: The client's name.
        workspace: Resident base and rows.
        model: The model that clients use in turn.
        folder: The folder of its personal state and predictions.
        observer: Receives progress.
        standing: Who the client is to others, with secure aggregation.
    """

    def __init__(
        self,
        name: str,
        workspace: Workspace,
        model: ClientModel,
        folder: Path,
        observer: Observer | None = None,
        standing: Standing | None = None,
    ) -> None:
        self.standing = standing
        self.name, self.workspace, self.model, self.folder = name, workspace, model, folder
        self.observer = observer or Observer()
        self.config, self.method = model.config, model.method
        self.store = PersonalStore(folder / "personal" / f"{name}.safetensors", model.base.fingerprint)

    @property
    def encoder(self) -> PromptEncoder:
        """The encoder of the client's prompts."""
        return self.workspace.encoder_for(self.name)

    @property
    def rows(self) -> ClientRows:
        """The client's rows."""
        return self.workspace.clients[self.name]

    @cached_property
    def examples(self) -> Sequence[Example]:
        """The encoded rows that the client trains on; they are read and encoded on first access."""
        return TrainRows(self._read_examples)

    def _read_examples(self) -> list[Example]:
        owners = self.workspace.clients if self.method.pools_rows else [self.name]
        return [example for owner in owners for example in self.workspace.examples(owner)]

    def join(self) -> dict[str, str | int]:
        """Return what the server may know of this client: name, base, number of train rows, the method's report.

        If the report needs ``Method.prepare``, the client prepares now; else in its first round, because of many
        clients few may ever train.
        """
        site = self.model.site(self.name, ())
        if self.method.reports_prepared(self.config):
            _, meta = self._stored(_NEWEST)
            site = self.model.site(self.name, self.examples, _prepared(meta))
        return {
            "client": self.name,
            "base": self.model.base.fingerprint,
            "train_rows": len(self.rows.train),
            "report": json.dumps(self.method.report(site)),
        }

    def initial(self, agreement: Any) -> tuple[Payload, str]:
        """Return the shared weights before any training, and the parameter table as JSON; alike on every client."""
        _, meta = self._stored(_NEWEST)
        site = self.method.initial_site(self.model.site(self.name, self.examples, _prepared(meta), agreement))
        with self.model.lend(site, {}) as (split, _):
            return encode(split, self.method.initial(split)), json.dumps(split.describe())

    @cached_property
    def masked(self) -> Masked | None:
        """The client's part of secure aggregation; None if the recipe has none."""
        if not is_secure(self.config):
            return None
        return Masked(self.name, self.folder, self.config.privacy, self.standing, self.observer.notice)

    def train(self, request: Request) -> Trained:
        """Train one round from the server's weights; the personal part is saved on disk."""
        with self._training(request, request.round - 1) as (turn, meta), seeded(turn.stream.initial_seed()):
            # Dropout draws from the global stream.
            self.method.receive(turn)
            result = self.method.train(turn)
            bare = encode(turn.split, self.method.outgoing(turn))
            sent = protect(self.config, request.payload, bare, turn.memory, self.name)
            self._keep(turn, meta, vector_hash(request.payload.vector))
        groups = {"shared_parameters": turn.split.shared, "personal_parameters": turn.split.personal}
        trained = {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}
        measures = {n: getattr(result, n) for n in ("loss", "steps", "shared_steps", "tokens")} | trained
        metrics = {name: measures[name] for name in told(self.config, measures)}
        private = {**turn.split.personal, **_under(MOMENTS, turn.moments or {})}
        return Trained(Update(self.name, sent.payload, len(self.examples), metrics), turn.split, private, sent)

    def evaluate(
        self, request: Request, states: Sequence[_State], rows: Sequence[Row] | None = None, *, answers: bool = True
    ) -> dict[_State, Scores]:
        """Score model states on given rows, by default on the client's own rows of the split that the recipe names.

        Args:
            request: The finished global model.
            states: Which of zero_shot, global, personalized, chosen, and the candidates of a floor.
            rows: The rows.
            answers: Whether to generate answers; without them only the NLL is computed.
        """
        rows, what = self.scored_rows if rows is None else rows, "answers" if answers else "NLL"
        total = len(states) * len(rows)
        reports = [self.counter("evaluation", f"{s} {what}", total, i * len(rows)) for i, s in enumerate(states)]
        with in_states(self, request) as enter:
            return {
                s: self._score(request, enter, s, rows, answers, told)
                for s, told in zip(states, reports, strict=True)
            }

    def score(self, request: Request, state: State, rows: Sequence[Row]) -> Scores:
        """Score one model state on given rows."""
        return self.evaluate(request, [state], rows)[state]

    def _score(
        self,
        request: Request,
        enter: InState,
        state: str,
        rows: Sequence[Row],
        answers: bool,
        on_rows: Callable[[int], None],
    ) -> Scores:
        """Score one model state on given rows; zero-shot scores are cached in the workspace."""
        on_rows(0)
        known, batch_size = self.workspace.untouched.scores, self.config.evaluation.batch_size
        limit = answer_limit(self.workspace, self.config)
        pairs = self.encoder.pairs and all(row.rejected for row in rows)
        settings = EvaluationSettings(limit, batch_size, self.config.model.precision, answers, pairs)
        template = "chat" if self.encoder.chat else "alpaca"
        encoded = self.config.training.max_length, self.config.data.loss_on, template
        key = rows_hash(ClientRows((), tuple(rows))), encoded, settings
        if state == "zero_shot" and key in known:
            with enter(state):  # a client that is scored has a stored state, even with cached scores
                return known[key]
        with enter(state) as (turn, on_batch):
            scores = evaluate(turn.model, self.encoder, rows, settings, on_rows, on_batch)
        if pairs:
            with_answers = *key[:2], replace(settings, answers=True)
            base = scores if state == "zero_shot" else known.get(with_answers)
            base = base or self._score(request, enter, "zero_shot", rows, False, lambda done: None)
            scores = scores.rewarded(base, self.config.training.dpo_beta)
        if state == "zero_shot":
            known[key] = scores
        return scores

    @contextmanager
    def in_state(self, request: Request, state: str) -> Iterator[tuple[Any, OnBatch | None]]:
        """Yield the model in a state, and the function to call before every batch; see ``turn_in``."""
        with self.turn_in(request, state) as (turn, on_batch):
            yield turn.model, on_batch

    @contextmanager
    def turn_in(self, request: Request, state: str) -> Iterator[tuple[Turn, OnBatch | None]]:
        """Yield a turn with the model in one of the client's states, and the function to call before every batch.

        Args:
            request: The finished global model.
            state: zero_shot is the untouched base, global the shared weights alone, personalized everything, chosen
                what the client keeps; or one of ``kit.candidates.CANDIDATES``.
        """
        with in_states(self, request) as enter, enter(state) as found:
            yield found

    @contextmanager
    def in_use(self, request: Request) -> Iterator[Turn]:
        """Yield a turn with the finished model, for ``Method.in_state``; no row is read for it."""
        with self._turn(request, request.round, self._settings()) as (turn, meta):
            self.method.receive(turn)
            if self.method.settles:
                turn.settled |= self._settled(request, meta).load(self.model.device)
            yield turn

    def settle(self, request: Request) -> None:
        """Save what the states need from the client's rows, and after the last round what the client keeps."""
        if self.method.settles:
            with self._turn(request, request.round, self._settings()) as (turn, meta):
                self.method.receive(turn)
                self._settled(request, meta).save(self.method.settle(turn))
        if self._ends(request):
            self.choice(request)

    def _settled(self, request: Request, meta: PersonalMeta) -> Settled:
        path = self.folder / "personal" / "settled" / f"{self.name}.safetensors"
        return Settled(path, meta.base, meta.round, vector_hash(request.payload.vector))

    @property
    def last_round(self) -> int:
        """The run's last round, with the method's extra ones."""
        return self.method.total_rounds(self.config.federation.rounds)

    def _ends(self, request: Request) -> bool:
        """Return whether the client chooses what it keeps now."""
        return self.config.floor is not None and request.round == self.last_round

    def choice(self, request: Request) -> dict[str, Any]:
        """Return which candidate the client keeps, with the scores that decided; on first use it is decided.

        Nothing of it is sent. The record is in the client's own folder, and counts for one finished model only.
        If another process decides it now, this one waits for it.

        Args:
            request: The finished global model.

        Returns:
            ``chosen``, ``validation`` and ``test`` (None until ``test_candidates``); see ``floor.record_of``.

        Raises:
            ArtifactError: Another process has been deciding it for longer than ``federation.deadline``.
        """
        path, of = self._choice_path, self._finished(request)
        with deciding(path, of, self.config.federation.deadline, self.observer.notice) as record:
            if record is None:
                scores = self.evaluate(request, self._candidates(request), self.rows.validation, answers=False)
                chosen = choose({name: its.losses for name, its in scores.items()}, scores["zero_shot"].weights)
                record = {**of, "chosen": chosen, "validation": record_of(scores), "test": None}
                write_json(path, sealed(record))
        return record

    def test_candidates(self, request: Request, scores: Mapping[_State, Scores]) -> None:
        """After the last round, add the candidates' NLL on the scored rows to the record of the client's choice.

        Args:
            request: The finished global model.
            scores: The scores of the method's states on these rows.
        """
        if not self._ends(request):
            return
        record, known = self.choice(request), {str(state): its for state, its in scores.items()}
        names = [*record["validation"]["nll"]]
        known |= self.evaluate(request, [name for name in names if name not in known], answers=False)
        write_json(self._choice_path, sealed(record | {"test": record_of({name: known[name] for name in names})}))

    @property
    def has_chosen(self) -> bool:
        """Whether the client has decided what it keeps."""
        return self._choice_path.exists()

    @property
    def _choice_path(self) -> Path:
        return self.folder / "floor" / f"{self.name}.json"

    def _finished(self, request: Request) -> dict[str, str | int]:
        """Return what distinguishes the client's finished model from others."""
        (_, meta), rounds = self._stored(request.round), self.config.federation.rounds
        shared = vector_hash(request.payload.vector)
        return {"base": meta.base, "round": meta.round, "shared": shared, "rounds": rounds}

    def _candidates(self, request: Request) -> list[str]:
        """Return the models to compare; one that is trained on the client's rows alone is trained here."""
        names = candidates_of(self.method, self.config)
        try:
            if "local" in names:
                self._train_alone(self._stored(request.round)[1])
        except FederationError as error:  # its training has diverged, which must not end the run
            self.observer.notice(f"{self.name}: no local model to choose; {error}")
            names.remove("local")
        return names

    @cached_property
    def alone(self) -> Client:
        """The same client, trained on its own rows alone: its state is personal, and has a folder of its own."""
        model, folder = self.model.alone(self.config), self.folder / "personal" / "local"
        return Client(self.name, self.workspace, model, folder, self.observer, self.standing)

    def alone_request(self, number: int | None = None) -> Request:
        """Return the request of a round of ``alone``, the last one by default."""
        return Request(Payload.empty(), None, number or self.alone.config.federation.rounds)

    def _train_alone(self, meta: PersonalMeta) -> None:
        """Train ``alone`` for its rounds, from where it was interrupted; each round is saved."""
        alone, stored = self.alone, self.alone.store.load(_NEWEST)
        steps = alone._local_settings(1).total_steps
        if stored is None or stored[1].total_steps != steps:  # none, or of another schedule
            stored = {}, replace(meta, round=0, shared="", total_steps=steps)  # same experts: no second selection
            alone.store.save(*stored)
        for number in range(stored[1].round + 1, alone.config.federation.rounds + 1):
            alone.train(self.alone_request(number))

    def answer_counts(self, scores: Mapping[_State, Scores]) -> dict[str, int]:
        """Return the answer limit in tokens, the number of longer references, and each state's cut answers."""
        limit = answer_limit(self.workspace, self.config)
        longer = longer_references(self.workspace, self.config, self.name, limit)
        cut = {f"cut.{state}": its.cut for state, its in scores.items()}
        return {"max_new_tokens": limit, "longer_references": len(longer), **cut}

    def write_predictions(self, scores: Mapping[_State, Scores]) -> None:
        """Write each scored row with its generated answers and scores, in the client's own folder."""
        lines = [
            json_text(
                row.texts
                | {state: score.predictions[index] for state, score in scores.items()}
                | {"scores": {state: score.row(index) for state, score in scores.items()}}
            )
            for index, row in enumerate(self.scored_rows)
        ]
        write_text(self.folder / "predictions" / f"{self.name}.jsonl", "\n".join(lines) + "\n")

    def write_routing(self, request: Request, states: Sequence[State]) -> None:
        """Write how the client's rows are routed, in its own folder, if the recipe asks for it."""
        rows, evaluation = self.scored_rows, self.config.evaluation
        if not evaluation.routing_rows:
            return
        batches = prompt_batches(self.encoder, rows[: evaluation.routing_rows], evaluation.batch_size)
        with self.in_use(request) as turn:
            lines = routing_lines(turn, self.method, states, batches, self.workspace.untouched.routing)
        write_routing(self.folder / "routing" / f"{self.name}.jsonl", lines)

    @property
    def scored_rows(self) -> tuple[Row, ...]:
        """The client's rows that evaluation scores."""
        return scored_rows(self.rows, self.config.evaluation)

    @contextmanager
    def _training(self, request: Request, up_to: int) -> Iterator[tuple[Turn, PersonalMeta]]:
        """Yield a turn that trains on the client's rows; see ``_turn``."""
        settings = self._local_settings(request.round)
        with self._turn(request, up_to, settings, trains=True) as (turn, meta):
            count = self.counter("training", f"round {request.round}", settings.steps)
            count(0)
            turn.on_step = lambda loss, tokens: count(1, loss, tokens)
            yield turn, meta

    @contextmanager
    def _turn(
        self, request: Request, up_to: int, settings: LocalSettings, *, trains: bool = False
    ) -> Iterator[tuple[Turn, PersonalMeta]]:
        """Yield a turn on the model, from the newest stored state up to a round, and that state's meta."""
        tensors, meta = self._stored(up_to)
        device = self.model.device
        memory = {n.removeprefix(_MEMORY): t.to(device) for n, t in tensors.items() if n.startswith(_MEMORY)}
        personal = {n: t for n, t in tensors.items() if not n.startswith((_MEMORY, MOMENTS))}
        keeps = trains and self.config.training.moments(self.method.moments) == "kept"
        moments = {n.removeprefix(MOMENTS): t for n, t in tensors.items() if n.startswith(MOMENTS)}
        received = {n: t.to(device) for n, t in request.payload.tensors().items()}
        stream = generator(self.config.seed, self.name, request.round, "batches")
        site = self.model.site(self.name, self.examples, _prepared(meta), request.agreement)
        with repeatable(device), self.model.lend(site, personal) as (split, parts):
            turn = Turn(site, request.round, split, parts, received, memory, settings, stream)
            turn.moments = moments if keeps else None
            if self.config.training.objective == "dpo":
                reference = partial(self.method.in_state, turn, "zero_shot")
                turn.objective = DirectPreference(self.config.training.dpo_beta, reference)
            yield turn, meta

    def _keep(self, turn: Turn, meta: PersonalMeta, shared: str) -> None:
        state = _under(_MEMORY, turn.memory) | _under(MOMENTS, turn.moments or {})
        new = replace(meta, round=turn.round, shared=shared, total_steps=turn.settings.total_steps)
        self.store.save({**turn.split.personal, **state}, new)

    def _stored(self, up_to: int) -> tuple[dict[str, Tensor], PersonalMeta]:
        """Return the client's stored tensors and their meta; on first use, prepare and store them."""
        stored = self.store.load(up_to)
        if stored is None:
            prepared = self._prepare()
            meta = PersonalMeta(
                self.name, self.model.base.fingerprint, 0, "", prepared.choice, prepared.selection, prepared.scales
            )
            self.store.save({}, meta)
            stored = {}, meta
        return stored

    def _prepare(self) -> Prepared:
        def report(done: int, total: int) -> None:
            self.observer.turn(TurnState(self.name, "selection", "selection", done, total))

        report(0, 0)
        with repeatable(self.model.device):
            prepared = self.method.prepare(replace(self.model.site(self.name, self.examples), on_batch=report))
        if prepared.choice and self.config.graft.sharing != "shared":  # else the clients choose together
            self.observer.chosen(self.name, prepared.choice)
            write_json(self.folder / "selection" / f"{self.name}.json", asdict(prepared))
        return prepared

    def _local_settings(self, round_number: int) -> LocalSettings:
        owners = self.workspace.clients if self.method.pools_rows else [self.name]
        rows = (len(self.workspace.clients[owner].train) for owner in owners)
        steps = sum(map(self.config.training.steps_per_round, rows))
        settings = self._settings(steps, self.config.federation.rounds * steps, (round_number - 1) * steps)
        seconds = self.config.training.local_seconds
        if seconds is None or self.standing is not None:  # a silo's own machine has a clock
            return replace(settings, seconds=seconds)
        # As many as begin in time, as on a clock; 0.6 / 0.2 is just below 3 in floating point.
        simulated = max(1, math.ceil(round(seconds / self.config.federation.seconds_of_step(self.name), 9)))
        return replace(settings, steps=min(steps, simulated))

    def _settings(self, steps: int = 0, total_steps: int = 0, first_step: int = 0) -> LocalSettings:
        """Return the local settings for this number of steps; a model that is only used has none."""
        return LocalSettings(
            training=self.config.training,
            precision=self.config.model.precision,
            pad_token_id=self.workspace.encoder.tokenizer.pad_token_id,
            steps=steps,
            total_steps=total_steps,
            first_step=first_step,
            warmup_steps=round(self.config.training.warmup_ratio * total_steps),
            own_lr={} if (rate := self.config.graft.gate_lr) is None else {GATES: rate},
        )

    def counter(self, phase: Phase, text: str, total: int, done: int = 0) -> Callable[..., None]:
        """Return a function that tells the observer what more is done; see ``TurnState`` for the arguments."""
        tokens = 0

        def add(count: int, loss: float | None = None, read: int = 0) -> None:
            nonlocal done, tokens
            done, tokens = done + count, tokens + read
            # Some methods take the steps twice.
            of = total * max(1, -(-done // total)) if total else 0
            self.observer.turn(TurnState(self.name, phase, text, done, of, loss, tokens))

        return add


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _prepared(meta: PersonalMeta) -> Prepared:
    return Prepared(meta.choice, meta.selection, meta.scales)


class Resident:
    """One run's base, adapters and clients, kept in a process between messages.

    Args:
        workspace: Base and rows.
        config: The run; only its method may differ from the workspace's.
        folder: The folder of the clients' files.
        standing: Who the clients are to others, if it is not this run that decides it.
    """

    def __init__(
        self, workspace: Workspace, config: RunConfig, folder: Path, standing: Standing | None = None
    ) -> None:
        self.workspace, self.folder = workspace, folder
        self.model = model = ClientModel(workspace.base, config, make_method(config.method))
        self._client = lru_cache(CLIENTS_KEPT)(
            lambda name: Client(name, workspace, model, folder, current_observer(), standing)
        )

    def client(self, name: str) -> Client:
        """Return a client by name; its state is on disk."""
        return self._client(name)
