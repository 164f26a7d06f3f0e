"""A tiny finished run whose clients' models really differ, and asking its engine."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.finished.trained import TrainedRun
from flexperts.parameters.vector import Payload
from flexperts.serving.contract import ModelName, Piece, Sampling
from flexperts.serving.engine.engine import ServingEngine

Recipe = Callable[..., RunConfig]
QUESTIONS = ("Hi", "Sum up the note about the till and the shelf please", "Why?", "What is this note about?")
LENGTH = 10
_SHORT = (
    "data.silos.train_rows=4",
    "training.local_steps=1",
    "training.batch_size=1",
    "graft.calibration_rows=1",
    "federation.rounds=1",
    "evaluation.rows=1",
    f"evaluation.max_new_tokens={LENGTH}",
)


def disturbed_run(recipe: Recipe, out: Path, *overrides: str) -> TrainedRun:
    """Return a run of the four silos that ship, its shared and personal weights moved apart by noise."""
    run_federation(recipe(*_SHORT, *overrides), out)
    trained = TrainedRun(out)
    trained.server.shared = Payload.of(_noisy(trained.server.shared.tensors(), "server"))
    for name in trained.clients:
        store = trained.client(name).store
        stored = store.load(10**9)
        assert stored
        store.save(_noisy(stored[0], name), stored[1])
    return trained


def _noisy(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return {n: t + 0.15 * torch.randn(t.shape, generator=stream) for n, t in tensors.items()}


@dataclass
class Asked:
    """One request and what came of it; ``on_first`` is called on the engine's thread, at the first piece."""

    on_first: Callable[[], object] | None = None
    pieces: list[Piece] = field(default_factory=list)
    request: Any = None
    _new: queue.SimpleQueue[Piece] = field(default_factory=queue.SimpleQueue)

    def hear(self, piece: Piece) -> None:
        first, self.on_first = self.on_first, None
        if first:
            first()
        self._new.put(piece)

    def next(self) -> Piece:
        """Wait for one piece more."""
        self.pieces.append(self._new.get(timeout=60))
        return self.pieces[-1]

    def wait(self) -> str:
        """Return the whole text."""
        while not self.pieces or self.pieces[-1].finish is None:
            self.next()
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.request.answer.tokens
        return tokens


def ask(
    engine: ServingEngine,
    model: ModelName,
    question: str,
    sampling: Sampling | None = None,
    on_first: Callable[[], object] | None = None,
) -> Asked:
    """Send one request."""
    asked = Asked(on_first)
    prompt = engine.prompt_tokens([{"role": "user", "content": question}], model)
    asked.request = engine.submit(model, prompt, sampling or Sampling(LENGTH), asked.hear)
    return asked


def ask_all(engine: ServingEngine, asks: Sequence[tuple[ModelName, str]]) -> list[Asked]:
    """Send requests together and wait for all."""
    found = [ask(engine, *one) for one in asks]
    for asked in found:
        asked.wait()
    return found


@contextmanager
def serving(trained: TrainedRun, **limits: Any) -> Iterator[ServingEngine]:
    """Yield an engine on a run, and leave the run open."""
    engine = ServingEngine(trained, company=0.1, **limits)
    try:
        yield engine
    finally:
        engine.close()


def ask_in_waves(engine: ServingEngine, asks: Sequence[tuple[ModelName, str]], size: int) -> list[Asked]:
    """Send so many requests, the next ones when the first of these has said something, and so on; wait for all."""
    found: list[Asked] = []
    sending = threading.Lock()  # the engine may answer the first one of a wave before the wave is complete

    def wave() -> None:
        with sending:
            start, end = len(found), len(found) + size
            model, question = asks[start]
            found.append(ask(engine, model, question, on_first=wave if end < len(asks) else None))
            found.extend(ask(engine, *one) for one in asks[start + 1 : end])

    wave()
    while any(not asked.pieces or not asked.pieces[-1].finish for asked in found):
        for asked in found:
            asked.wait()
    return found


def everything(trained: TrainedRun) -> list[tuple[ModelName, str]]:
    """Return every client in every state, with questions of different lengths."""
    names = [ModelName(c, s) for c in trained.clients for s in trained.model.method.states]
    return [(name, QUESTIONS[number % len(QUESTIONS)]) for number, name in enumerate(names)]
