"""The engine: one thread that answers requests for all models of a run from one resident base.

Requests wait in one queue, first come first served. The first one's lane decides how the base is set up; requests
behind it that can share its batch join, also while it runs (where the cache allows it), up to ``max_rows`` rows and
``max_tokens`` tokens of cache. None overtakes another, so none starves.
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
from flexperts.serving.contract import Counters, Message, ModelName, Piece, Request, Sampling
from flexperts.serving.engine.batch import Batch, Row, probe
from flexperts.serving.engine.decoding import Decoding, check_sampling
from flexperts.serving.engine.lanes import Lane, lanes_of

_NO_LIMIT = 1 << 20
"""Context of a model that names none, in tokens."""


def open_engine(
    run: Path, *, max_rows: int = 16, max_tokens: int = 16_384, base: str | None = None
) -> ServingEngine:
    """Load a finished run and start answering.

    Args:
        run: The run directory.
        max_rows: Most rows of a batch.
        max_tokens: Most tokens, prompts and answers together, that a batch's cache may hold, padding included.
        base: Where the run's base lies, if not where its recipe says.

    Raises:
        ArtifactError: The directory holds no finished run, or its files do not fit the base.
        ConfigError: A limit is below 1.
    """
    return ServingEngine(TrainedRun(run, base=base), max_rows=max_rows, max_tokens=max_tokens)


class ServingEngine:
    """See ``contract.Engine``.

    Args:
        trained: The run; the engine has it to itself until ``close``.
        max_rows, max_tokens: As for ``open_engine``.
        company: Seconds that a first request waits for others to share its batch.
    """

    def __init__(
        self, trained: TrainedRun, *, max_rows: int = 16, max_tokens: int = 16_384, company: float = 0.003
    ) -> None:
        if max_rows < 1 or max_tokens < 2:
            raise ConfigError(
                f"max_rows = {max_rows}, max_tokens = {max_tokens}", "a batch holds a row of two tokens", "raise it"
            )
        self._trained, self._max_rows, self._max_tokens, self._company = trained, max_rows, max_tokens, company
        self._lanes = lanes_of(trained)
        self._base, self._encoder = trained.model.base.model, trained.workspace.encoder
        self._sharing = probe(self._base)
        self._ends = frozenset(end_tokens(self._base, self._encoder))
        # Tokenizers are not made for two threads: the engine decodes with one, and askers encode with another.
        self._askers = copy.copy(self._encoder)
        self._askers.tokenizer, self._encoding = copy.deepcopy(self._encoder.tokenizer), threading.Lock()
        self._queue: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed, self._counters = False, Counters()
        self._failure: FlexpertsError | None = None
        self._lane: Lane | None = None
        self._batch: Batch | None = None
        self._open = ExitStack()
        self._thread = threading.Thread(target=self._run, name="flexperts serving", daemon=True)
        self._thread.start()

    @property
    def models(self) -> tuple[ModelName, ...]:
        """What can be asked."""
        return tuple(self._lanes)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        known = getattr(self._base.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
        return min(int(known), self._max_tokens)

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        return self._counters

    @property
    def queue_length(self) -> int:
        """Requests that wait for a place in a batch."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        batch = self._batch  # the engine's thread may take it away meanwhile
        return len(batch.rows) if batch else 0

    @property
    def failure(self) -> FlexpertsError | None:
        """Why the engine answers no more."""
        return self._failure

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return a conversation's tokens; see ``contract.Engine``."""
        with self._encoding:
            tokens = self._askers.conversation(messages)
        self._check_room(tokens)
        return tokens

    def submit(
        self, model: ModelName, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Request:
        """Ask a model; see ``contract.Engine``."""
        if model not in self._lanes:
            raise ConfigError(f"model {str(model)!r}", "the engine has no such model", "ask one of its models")
        check_sampling(sampling)
        self._check_room(prompt)
        most = min(len(prompt) + sampling.max_new_tokens, self.context_length)
        sampling = replace(sampling, max_new_tokens=most - len(prompt))

        def heard(piece: Piece) -> None:
            ended, failed = piece.finish is not None, piece.finish == "error"
            self._count(generated_tokens=piece.tokens, finished=ended, failed=failed)
            on_piece(piece)

        row = Row(model, prompt, Decoding(self._encoder.tokenizer, self._ends, sampling), most, heard)
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
        self._trained.close()

    def _check_room(self, prompt: Sequence[int]) -> None:
        if not 0 < len(prompt) < self.context_length:
            raise DataError(
                f"a prompt of {len(prompt)} tokens",
                f"prompt and answer share a context of {self.context_length} tokens",
                "shorten the messages" if prompt else "say something",
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
        self._batch = None
        self._open.close()

    def _has_work(self) -> bool:
        """Wait for a request, and a moment for company; return False once the engine is closed."""
        with self._changed:
            if not self.running:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._changed.wait_for(lambda: len(self._queue) >= self._max_rows or self._closed, self._company)
            return not self._closed

    def _advance(self) -> None:
        """Let who fits join the batch, and take one token for every row."""
        new: list[Row] = []
        try:
            self._admit(new)
            batch = self._batch
            if batch and new:
                batch.add(new)
                self._count(steps=1, prefills=1, rows=len(new), prompt_tokens=sum(len(r.prompt) for r in new))
            if batch and batch.rows:
                self._count(steps=1, rows=len(batch.rows))
                batch.step()
        except Exception as error:  # out of memory, a damaged file: it ends who was in the batch, not the engine
            running = self._batch.leave() if self._batch else []
            for row in {*running, *new}:
                row.fail(error)
            self._leave()
            probe(self._base)  # a device that can compute nothing any more does end the engine

    def _admit(self, new: list[Row]) -> None:
        """Move rows from the head of the queue to ``new``, in their order."""
        self._forget_cancelled()
        while self._queue and self._fits(self._queue[0], new):
            new.append(self._queue.popleft())
            self._enter(self._lanes[new[-1].model])

    def _forget_cancelled(self) -> None:
        with self._changed:
            gone = [row for row in self._queue if row.cancelled]
            self._queue = deque(row for row in self._queue if not row.cancelled)
        for row in gone:
            row.drop()

    def _fits(self, row: Row, new: Sequence[Row]) -> bool:
        """Tell whether a row may join those that run and those that are about to."""
        others = [*(self._batch.rows if self._batch else ()), *new]
        if self._batch is None or not others:
            return True
        longest = max(other.most_tokens for other in (row, *others))
        return (
            self._lanes[row.model] is self._lane
            and not self._lane.one_row
            and self._sharing != "never"
            and (self._sharing == "any time" or not self._batch.rows)
            and len(others) < self._max_rows
            and (len(others) + 1) * longest <= self._max_tokens
        )

    def _leave(self) -> None:
        """Take the lane's changes off the base; if that fails, no later request may meet what is left."""
        self._lane, self._batch = None, None
        self._open.close()

    def _enter(self, lane: Lane) -> None:
        """Set the base up for a lane, if it is not already."""
        if lane is self._lane:
            return
        self._leave()
        self._open.enter_context(lane.opened())
        self._lane = lane
        self._batch = Batch(self._base, lane, self._encoder, self._trained.config.model.precision)
