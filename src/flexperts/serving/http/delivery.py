"""Transfer of one answer from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from flexperts.errors import ServingError
from flexperts.serving.contract import Engine, ModelName, Piece, RequestHandle, Sampling
from flexperts.serving.http.metrics import Metrics
from flexperts.serving.http.refusals import RefusedError, failed, stopping

_QUIET = 15.0
"""Seconds without a piece after which a comment is sent, so that proxies keep the connection."""
_NO_RETRY = {"x-should-retry": "false"}


class Delivery:
    """A request that the engine has accepted, and its pieces as they arrive; created on the event loop's thread.

    Args:
        engine: The engine that answers.
        model: The model that is asked.
        prompt: The prompt's tokens.
        sampling: How to draw the answer.
        seconds: Time limit of the answer.
        metrics: Where times and tokens are recorded.
        on_end: Called once on the event loop, when the engine has ended the request.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelName,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        seconds: float,
        metrics: Metrics,
        on_end: Callable[[], None],
    ) -> None:
        self.model, self.prompt_tokens, self.tokens = model, len(prompt), 0
        self._metrics, self._on_end, self._seconds = metrics, on_end, seconds
        self._started = time.monotonic()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_piece(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._arrived, piece)

        self._request: RequestHandle = engine.submit(model, prompt, sampling, on_piece)

    def cancel(self) -> None:
        """End the request; this does nothing if it has already ended."""
        self._request.cancel()

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """Yield the pieces up to the last, and None after every 15 seconds without one.

        Raises:
            RefusedError: The engine failed or was closed, or the time limit is exceeded.
        """
        while True:
            try:
                async with asyncio.timeout(min(_QUIET, self._left())):
                    piece = await self._pieces.get()
            except TimeoutError:
                yield None
                continue
            if piece.error:
                raise failed(piece.error)
            if piece.finish == "cancelled":
                raise stopping()
            yield piece
            if piece.finish:
                return

    def _left(self) -> float:
        left = self._seconds - (time.monotonic() - self._started)
        if left > 0:
            return left
        error = ServingError(
            "this request", f"an answer may take at most {self._seconds:g} s", "ask for fewer tokens"
        )
        # OpenAI's client retries after a 5xx, which would only lengthen the queue.
        raise RefusedError(504, error, code="timeout", headers=_NO_RETRY)

    def _arrived(self, piece: Piece) -> None:
        seconds = time.monotonic() - self._started
        if piece.tokens and not self.tokens:
            self._metrics.first_token(str(self.model), seconds)
        self.tokens += piece.tokens
        if piece.finish:
            self._metrics.answer(str(self.model), seconds, self.prompt_tokens, self.tokens)
            self._on_end()
        self._pieces.put_nowait(piece)
