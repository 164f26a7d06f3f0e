"""The engine: one thread that answers requests for all models of a run from one resident base.

Requests wait in one queue, first come first served. The first request's lane decides how the base is set up. The
requests after it that can share its batch join it, up to ``max_rows`` rows and ``max_tokens`` tokens of cache;
where the cache allows it, they also join a running batch. No request overtakes another, so none waits forever.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from flexperts.errors import ConfigError, DataError, FlexpertsError, ServingError
from flexperts.evaluation.generation import end_tokens
from flexperts.finished.trained import TrainedRun
from flexperts.observer import current_observer
from flexperts.serving.contract import Counters, Message, ModelName, Piece, RequestHandle, Sampling
from flexperts.serving.engine.batch import Batch, RequestState, probe
from flexperts.serving.engine.decoding import Decoding, check_sampling
from flexperts.serving.engine.lanes import Lane, Lanes, Models, OwnLane

_NO_LIMIT = 1 << 20
"""Context of a model whose config has no limit, in tokens."""


def open_engine(
    run: Path,
    *,
    max_rows: int = 16,
    max_tokens: int = 16_384,
    max_clients: int | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> ServingEngine:
    """Load a finished run and start answering.

    Args:
        run: The run directory.
        max_rows: Most rows of a batch.
        max_tokens: Most tokens in a batch's cache: prompts, answers and padding together.
        max_clients: Most clients whose models are in memory; all by default.
        base: Where the run's base is, if not where its recipe says.
        trust_remote_code: Whether code of the base may run; a recipe that asks for it is refused otherwise.
    """
    trained = TrainedRun(run, base=base, trust_remote_code=trust_remote_code)
    current_observer().stage("preparing the models")
    return ServingEngine(trained, max_rows=max_rows, max_tokens=max_tokens, max_clients=max_clients)


class ServingEngine:
    """See ``contract.Engine``.

    Args:
        served: A run, or other models; only the engine may use it until ``close``.
        max_rows, max_tokens: As for ``open_engine``.
        max_clients: The same; for a run alone.
        company: Seconds for which a first request waits for others to share its batch.
    """

    def __init__(
        self,
        served: TrainedRun | Models,
        *,
        max_rows: int = 16,
        max_tokens: int = 16_384,
        max_clients: int | None = None,
        company: float = 0.003,
    ) -> None:
        if max_clients is not None and max_clients < 1:
            raise ConfigError(f"max_clients = {max_clients}", "one client must fit", "set it to 1 or more")
        if max_rows < 1 or max_tokens < 2:
            raise ConfigError(
                f"max_rows = {max_rows}, max_tokens = {max_tokens}",
                "a batch must have room for one row of two tokens",
                "set max_rows to 1 or more and max_tokens to 2 or more",
            )
        self._max_rows, self._max_tokens, self._company = max_rows, max_tokens, company
        self._lanes = served if isinstance(served, Models) else Lanes(served, max_clients)
        self._base, self._encoder = self._lanes.base, self._lanes.encoder
        self._sharing = probe(self._base)
        self._encoders = {name: self._lanes.encoder_of(name) for name in {model.client for model in self._lanes}}
        # Tokenizers are not thread-safe: the engine decodes with one, and callers encode with another.
        self._asking, self._encoding = copy.deepcopy(self._encoder.tokenizer), threading.Lock()
        self._queue: deque[RequestState] = deque()
        self._changed = threading.Condition()
        self._closed, self._counters = False, Counters()
        self._failure: FlexpertsError | None = None
        self._batch: Batch | None = None
        self._open = ExitStack()
        self._thread = threading.Thread(target=self._run, name="flexperts serving", daemon=True)
        self._thread.start()

    @property
    def models(self) -> tuple[ModelName, ...]:
        """The available models."""
        return tuple(self._lanes)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        known = getattr(self._base.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
        return min(int(known), self._max_tokens)

    @property
    def counters(self) -> Counters:
        """The engine's counters."""
        return self._counters

    @property
    def queue_length(self) -> int:
        """Number of requests that wait for a place in a batch."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        batch = self._batch  # the engine's thread may set it to None meanwhile
        return len(batch.rows) if batch else 0

    @property
    def failure(self) -> FlexpertsError | None:
        """Why the engine stopped answering; None while it works."""
        return self._failure

    def prompt_tokens(self, messages: Sequence[Message], model: ModelName | None = None) -> list[int]:
        """Return a conversation's tokens; see ``contract.Engine``."""
        encoder = copy.copy(self._encoder if model is None else self._encoders[model.client])
        encoder.tokenizer = self._asking
        with self._encoding:
            tokens = encoder.conversation(messages)
        self._check_room(tokens)
        return tokens

    def submit(
        self, model: ModelName, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> RequestHandle:
        """Queue a request; see ``contract.Engine``."""
        if model not in self._lanes:
            raise ConfigError(f"model {str(model)!r}", "the engine has no such model", "choose one of its models")
        check_sampling(sampling)
        self._check_room(prompt)
        most = min(len(prompt) + sampling.max_new_tokens, self.context_length)
        sampling = replace(sampling, max_new_tokens=most - len(prompt))

        def heard(piece: Piece) -> None:
            ended, failed = piece.finish is not None, piece.finish == "error"
            self._count(generated_tokens=piece.tokens, finished=ended, failed=failed)
            on_piece(piece)

        ends = frozenset(end_tokens(self._base, self._encoders[model.client]))
        row = RequestState(model, prompt, Decoding(self._encoder.tokenizer, ends, sampling), most, heard)
        with self._changed:
            if self._closed:
                raise self._ended()
            self._queue.append(row)
            self._count(requests=1)
            self._changed.notify()
        return row

    def close(self) -> None:
        """End all requests and free the base."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._lanes.close()

    def _check_room(self, prompt: Sequence[int]) -> None:
        if not 0 < len(prompt) < self.context_length:
            raise DataError(
                f"a prompt of {len(prompt)} tokens",
                f"prompt and answer share a context of {self.context_length} tokens",
                "shorten the messages" if prompt else "send a message that is not empty",
            )

    def _ended(self) -> FlexpertsError:
        return self._failure or ServingError("the engine", "it is closed", "start the server again")

    def _count(self, **more: int) -> None:
        with self._changed:
            sums = {name: getattr(self._counters, name) + count for name, count in more.items()}
            self._counters = replace(self._counters, **sums)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._has_work():
                self._advance()
        except Exception as error:
            self._failure = ServingError(
                "the engine", f"it failed ({type(error).__name__})", "start the server again"
            )
        with self._changed:
            self._closed = True
            rows = [*(self._batch.rows if self._batch else ()), *self._queue]
            self._queue.clear()
        for row in rows:
            row.fail(self._failure) if self._failure else row.drop()
        self._leave()

    def _has_work(self) -> bool:
        """Wait for a request, then briefly for others to share its batch; return False if the engine is closed."""
        with self._changed:
            if not self.running:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._changed.wait_for(lambda: len(self._queue) >= self._max_rows or self._closed, self._company)
            return not self._closed

    def _advance(self) -> None:
        """Let waiting rows that fit join the batch, and take one token for every row."""
        self._forget_cancelled()
        new: list[RequestState] = []
        try:
            while self._queue and self._fits(self._queue[0], new):
                if self._lanes.in_memory(self._queue[0].model) is None:
                    self._load(new)
                    if self.running:  # rows wait for one load between two tokens, not for more
                        break
                    continue
                new.append(self._queue.popleft())
                self._enter(self._lanes[new[-1].model])
            batch = self._batch
            if batch and new:
                batch.add(new)
                self._count(steps=1, prefills=1, rows=len(new), prompt_tokens=sum(len(r.prompt) for r in new))
            if batch and batch.rows:
                self._count(steps=1, rows=len(batch.rows))
                batch.step()
        except Exception as error:  # out of memory, a damaged file: the rows of the batch end, not the engine
            running = self._batch.leave() if self._batch else []
            for row in {*running, *new}:
                row.fail(error)
            self._leave()
            probe(self._base)  # if the device cannot compute any more, this ends the engine

    def _forget_cancelled(self) -> None:
        with self._changed:
            gone = [row for row in self._queue if row.cancelled]
            self._queue = deque(row for row in self._queue if not row.cancelled)
        for row in gone:
            row.drop()

    def _fits(self, row: RequestState, new: Sequence[RequestState]) -> bool:
        """Return whether a row may share a batch with the running rows and the new ones."""
        batch = self._batch
        if batch is None or not (batch.rows or new):
            return True
        rows = [row, *batch.rows, *new]
        may_join = self._sharing == "any time" or (self._sharing == "from the start" and not batch.rows)
        lane = self._lanes.in_memory(row.model)
        return (
            may_join
            and (lane is batch.lane or (lane is None and not isinstance(batch.lane, OwnLane)))
            and not batch.lane.one_row
            and len(rows) <= self._max_rows
            and len(rows) * max(r.most_tokens for r in rows) <= self._max_tokens
            and self._lanes.has_room([r.model for r in rows])
        )

    def _load(self, new: Sequence[RequestState]) -> None:
        """Load the models of the queue's first row, on the base without a lane; a failure ends the row."""
        batch, rows = self._batch, [*(self._batch.rows if self._batch else ()), *new]
        if batch is None or not rows:
            self._leave()
        self._open.close()
        try:
            self._lanes.load(self._queue[0].model, {row.model.client for row in rows})
        except Exception as error:  # a damaged file, no memory: the other rows go on
            self._queue.popleft().fail(error)
        if batch and rows:
            self._open.enter_context(batch.lane.opened())
            batch.lane.select([row.model for row in batch.rows])

    def _leave(self) -> None:
        """Undo the lane's changes to the base; the batch is forgotten first, in case this fails."""
        self._batch = None
        self._open.close()

    def _enter(self, lane: Lane) -> None:
        """Set the base up for a lane, if it is not already."""
        if self._batch and self._batch.lane is lane:
            return
        self._leave()
        self._open.enter_context(lane.opened())
        self._batch = Batch(self._base, lane, self._encoder, self._lanes.precision)
