"""The worker of a silo: one long-lived process that holds base, rows and private state, and answers requests.

Flower starts a process for every message. That process asks the worker, so that the base is loaded only once.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from flexperts.client.answer import ANSWERS, answer, answer_whole, checked_request, request_of
from flexperts.client.answer_limit import answer_limit, check_limit
from flexperts.client.client import Client, Resident
from flexperts.client.copy import with_weights
from flexperts.client.masking import Standing
from flexperts.client.workspace import Workspace
from flexperts.communication.schema import EvaluateRequest, TrainRequest
from flexperts.communication.wire import Fields, deserialize, serialize
from flexperts.config.model import ModelConfig
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment.home import keep_received
from flexperts.deployment.kept import keep_choices, keep_recipe, keep_rows, with_kept_choices
from flexperts.deployment.ledger import Asked, Ledger
from flexperts.deployment.policy import check_loss, check_policy, check_recipe, refusal
from flexperts.deployment.request_log import Entry, RequestLog
from flexperts.deployment.settings import for_silo
from flexperts.deployment.state import identity_file, private_folder
from flexperts.errors import ArtifactError, PolicyError, incompatible, logged, optional
from flexperts.methods.registry import make_method
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.observer import Observer, observing
from flexperts.protection.pipeline import checked_method
from flexperts.recipe import parse_recorded

if TYPE_CHECKING:
    from flexperts.deployment.silo_metrics import SiloMetrics

_DONE = {
    "query.join": "joined",
    "query.initial": "sent the initial shared weights",
    "query.keys": "sent keys and shares of secure aggregation",
    "train": "trained",
    "evaluate": "evaluated",
}

log = logging.getLogger(__name__)


class Worker:
    """A process that answers requests for one silo; the constructor loads the base.

    Args:
        silo: The silo's settings.
        observer: Receives progress.
    """

    def __init__(self, silo: SiloConfig, observer: Observer | None = None) -> None:
        self.silo, self.observer = silo, observer or Observer()
        self.loads = 0
        """How many times a base has been loaded."""
        self._run: tuple[str, str] | None = None
        self._resident: Resident | None = None
        self._base: LoadedBase | None = None
        check_policy(silo.policy)
        self._ledger = Ledger(Path(silo.state), silo.policy)
        self.requests, self._entry = RequestLog(Path(silo.state)), Entry()
        self._metrics = _metrics(silo, self._ledger)
        self._load(self._settings(silo))

    def reply(self, request: bytes | None) -> bytes:
        """Return the reply to a request, both packed by ``wire``; None is one that was too long to be read.

        An error reply names the error's class alone: its text may quote rows or paths, so it is only logged here.
        What the silo's policy does not allow is refused with the rule. A reply leaves when it is on record.
        """
        started, received = time.monotonic(), None if request is None else len(request)
        self._entry = Entry(self.requests.user, received=received)
        try:
            if request is None:
                raise refusal(self.silo.policy, "max_message_bytes", "a longer request")
            reply = self._answer(*deserialize(request))
        except PolicyError as error:
            log.error("%s", logged(error))
            self._entry.outcome, self._entry.rule = "refused", error.rule
            reply = serialize({"error": f"{type(error).__name__}: {error.rule}"})
        except Exception as error:  # the worker must survive any error
            log.error("%s", logged(error))
            self._entry.outcome, self._entry.rule = "failed", type(error).__name__
            reply = serialize({"error": type(error).__name__})
        self._entry.sent, self._entry.seconds = len(reply), round(time.monotonic() - started, 3)
        return self._on_record(reply)

    def _on_record(self, reply: bytes) -> bytes:
        try:
            self.requests.write(self._entry)
        except ArtifactError as error:
            return serialize({"error": type(error).__name__})
        if self._metrics is not None:
            self._metrics.count(self._entry)
        return reply

    def _answer(self, fields: Fields, content: RecordDict) -> bytes:
        kind, run, recipe = (_field(fields, name) for name in ("kind", "run", "recipe"))
        if kind not in ANSWERS:
            raise incompatible(f"request {kind[:80]!r}", f"a silo answers {', '.join(ANSWERS)}")
        self._entry.kind = kind
        started = time.monotonic()
        with observing(self.observer):
            resident = self._resident_of(run, recipe)
            client = resident.client(self.silo.name)
            self._entry.method = client.config.method.name
            whole = with_weights(kind, content, client)
            if whole is None or kind not in ("train", "evaluate"):
                reply, when = serialize({}, answer(kind, content, client)), f"run {run[:8]}"
                done = "asked for all weights" if whole is None else _DONE[kind]
            else:
                content, keep = whole
                asked = _asked(run, kind, content, client)
                self._entry.round = asked.round
                stored = self._ledger.reply_to(asked, client.config.privacy)
                if kind == "train" and _masks_anew(content, client):
                    stored = None  # the same update, with the masks of another session
                if stored:
                    self._entry.outcome = "repeated"
                reply = stored or self._released(asked, content, client)
                keep()
                when = f"run {run[:8]}, round {asked.round}"
                done = f"{_DONE[kind]} before, and sent the same reply" if stored else _DONE[kind]
                if kind == "evaluate" and asked.round == client.last_round and client.config.floor:
                    kept = client.choice(request_of(content, EvaluateRequest)[0])["chosen"]
                    done = f"{done}; this silo keeps {kept}, which is not sent"
        self.observer.stage(f"{when}: {done}, {time.monotonic() - started:.0f} s")
        return reply

    def _released(self, asked: Asked, content: RecordDict, client: Client) -> bytes:
        """Return the reply to a new request to train or evaluate, after it has been entered in the ledger."""
        policy, privacy, scored = self.silo.policy, client.config.privacy, client.scored_rows
        if asked.kind == "train":
            check_loss(policy, client.config, len(client.rows.train))
            scored = ()
        else:
            request, _ = request_of(content, EvaluateRequest)
            with client.in_use(request):  # weights that do not fit are refused
                keep_received(client.folder, content)  # first: what follows may train, and end badly
            try:
                if not policy.scores:
                    raise refusal(policy, "scores", "an evaluation")
                self._ledger.check_scored(scored)
            except PolicyError:  # without scores, the evaluation still brings the silo its own model
                client.settle(request)
                raise
        reply = serialize({}, answer_whole(asked.kind, content, client))
        self._ledger.record(asked, reply, privacy, scored)
        return reply

    def _resident_of(self, run: str, recipe: str) -> Resident:
        """Return the run's resident; another run's adapters are removed first, and the base stays loaded."""
        folder = private_folder(Path(self.silo.state), run)
        self._entry.run = run
        if self._resident is None or self._run != (run, recipe):
            config = parse_recorded(recipe)
            self._release()
            self._resident = self._open(config, folder)
            self._run = run, recipe
        return self._resident

    def _open(self, config: RunConfig, folder: Path) -> Resident:
        """Set up a run, and refuse what would otherwise fail in the middle of it. Rows are read again."""
        mine = with_kept_choices(for_silo(config, self.silo), folder)
        method = make_method(mine.method)
        self._entry.method = method.name
        check_recipe(self.silo.policy, config, method)
        checked_method(mine)
        # The adapter that is sent names the base as the recipe does, not by its path here.
        mine = mine.model_copy(update={"model": mine.model.model_copy(update={"base": config.model.base})})
        workspace = Workspace(mine, self._load_as(config))
        workspace.check(mine, needs_experts=method.needs_experts or mine.evaluation.routing_rows > 0)
        check_limit(workspace, mine, self.observer)
        self._ledger.join(folder.name, method.name)
        if keep_rows(folder, workspace.clients):
            self.observer.notice(
                f"run {folder.name[:8]}: its first rows are not on record; the current rows are recorded now"
            )
        keep_recipe(folder, config.to_toml())
        keep_choices(folder, workspace.template_date, answer_limit(workspace, mine))
        return Resident(workspace, mine, folder, Standing(identity_file(Path(self.silo.state)), self.silo.roster))

    def _release(self) -> None:
        resident, self._resident, self._run = self._resident, None, None
        if resident is not None:
            resident.model.close()

    def _load_as(self, config: RunConfig) -> LoadedBase:
        """Return the base, stored as the recipe says; load it again if it is stored otherwise."""
        wanted = self._settings(config.model)
        if self._base is None or wanted != self._loaded_as:
            self._load(wanted)
        assert self._base is not None
        return self._base

    def _settings(self, stored: SiloConfig | ModelConfig) -> ModelConfig:
        """Return the settings for loading the base; from a recipe only dtype and quantization are used."""
        silo = self.silo
        return ModelConfig(
            base=silo.base,
            dtype=stored.dtype,
            quantization=stored.quantization,
            device=silo.device,
            trust_remote_code=silo.trust_remote_code,
        )

    def _load(self, wanted: ModelConfig) -> None:
        started = time.monotonic()
        self._base = None  # two bases at a time may not fit
        self._base, self._loaded_as = load_base(wanted), wanted
        self.loads += 1
        told = f"{wanted.dtype}, {self._base.fingerprint[:12]}, {time.monotonic() - started:.0f} s"
        self.observer.stage(f"base loaded: {wanted.base} ({told})")


def _metrics(silo: SiloConfig, ledger: Ledger) -> SiloMetrics | None:
    if silo.metrics is None:
        return None
    with optional("metrics", "metrics in a silo's file"):
        from flexperts.deployment.silo_metrics import SiloMetrics
    return SiloMetrics(Path(silo.metrics), silo.name, ledger)


def _field(fields: Fields, name: str) -> str:
    if name not in fields:
        raise incompatible(f"a request without {name}", "it must have kind, run and recipe")
    return fields[name]


def _asked(run: str, kind: str, content: RecordDict, client: Client) -> Asked:
    if kind == "evaluate":
        request, its = checked_request(content, EvaluateRequest, client)
        return Asked.of(run, kind, request, its.states, its.answers)
    request, _ = checked_request(content, TrainRequest, client)
    return Asked.of(run, kind, request)


def _masks_anew(content: RecordDict, client: Client) -> bool:
    """Return whether a request to train has keys for which no update has been masked yet."""
    _, its = checked_request(content, TrainRequest, client)
    return client.masked is not None and bool(its.masking) and client.masked.is_new(its.masking)
