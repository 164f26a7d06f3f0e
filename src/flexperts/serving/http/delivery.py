"""One answer on its way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from flexperts.errors import ServingError
from flexperts.serving.contract import Engine, ModelName, Piece, Request, Sampling
from flexperts.serving.http.metrics import Metrics
from flexperts.serving.http.refusals import RefusedError, failed, stopping

_QUIET = 15.0
"""Seconds without a piece after which a proxy is shown that the connection lives."""
_NO_RETRY = {"x-should-retry": "false"}


class Delivery:
    """A request that the engine has accepted, and its pieces as they come; made on the event loop's thread.

    Args:
        engine: Who answers.
        model: Who is asked.
        prompt: Tokens.
        sampling: How to draw.
        seconds: How long it may take.
        metrics: Where times and tokens are noted.
        on_end: Called once on the loop, when the engine has ended the request.
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

        self._request: Request = engine.submit(model, prompt, sampling, on_piece)

    def cancel(self) -> None:
        """End it; nothing happens where it has ended already."""
        self._request.cancel()

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """Yield the pieces up to the last, and None after every quarter of a minute without one.

        Raises:
            RefusedError: The engine failed or was closed, or the time is over.
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
        error = ServingError("this request", f"an answer may take {self._seconds:g} s here", "ask for fewer tokens")
        # OpenAI's client asks again after a 5xx by itself, which would only lengthen the queue.
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
