"""State of the HTTP server: the engine once it is loaded, keys, limits, metrics, and who may call which model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import groupby

from starlette.requests import Request

from flexperts.errors import ConfigError
from flexperts.serving.contract import Engine, ModelName, find_model
from flexperts.serving.http.door import Door
from flexperts.serving.http.keys import OPERATOR, KeyRing, may_call
from flexperts.serving.http.metrics import Metrics
from flexperts.serving.http.refusals import RefusedError, later, refused, stopping
from flexperts.serving.http.settings import Limits

_LONGEST_MODEL = 500
"""Most characters of a model's name that a refusal repeats; every valid name is shorter."""
_LOADING = 5
"""Seconds after which a caller may try again while the base is loading."""


class Service:
    """One server's state; it can be used before the engine is loaded.

    Args:
        keys: The accepted keys.
        limits: The limits of requests.
    """

    def __init__(self, keys: KeyRing, limits: Limits) -> None:
        self.limits, self.load, self.metrics = limits, Load(limits), Metrics()
        self.since = int(time.time())
        self.door: Door | None = None
        self.tokenizing = Turns()
        self._keys = keys
        self._engine: Engine | None = None
        self._closed = False

    def ready(self, engine: Engine) -> None:
        """Use this engine from now on; called once, from any thread."""
        self.metrics.show(engine)
        self._engine = engine

    def close(self) -> None:
        """Close the engine, if it is loaded; this ends all requests in progress."""
        if self._engine and not self._closed:
            self._closed = True
            self._engine.close()

    @property
    def status(self) -> str:
        """The state: loading, ready or failed."""
        if self._engine is None:
            return "loading"
        return "failed" if self._engine.failure else "ready"

    @property
    def engine(self) -> Engine:
        """The engine."""
        if self._engine is None:
            raise later(503, "the base", "it is still loading", "loading", _LOADING)
        if self._engine.failure:
            raise refused(self._engine.failure)
        if self._closed:
            raise stopping()
        return self._engine

    def owner(self, request: Request) -> str:
        """Return the owner of a request's key."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            error = ConfigError(
                "the API key", "it is missing or unknown", "send a valid one as `Authorization: Bearer KEY`"
            )
            raise RefusedError(401, error, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.door:
            self.door.keep(request.client)
        return owner

    def check_operator(self, owner: str) -> None:
        """Refuse everyone except the operator."""
        if owner != OPERATOR:
            error = ConfigError("/metrics", "it has data of all clients", "use the operator's key")
            raise RefusedError(403, error, code="operator_only")

    def models(self, owner: str) -> list[ModelName]:
        """Return the models that the owner of a key may call."""
        return [model for model in self.engine.models if may_call(owner, model.client)]

    def model(self, name: str, owner: str) -> ModelName:
        """Return a model by name; a model that this owner may not call is treated as missing."""
        try:
            return find_model(name[:_LONGEST_MODEL], self.models(owner))
        except ConfigError as error:
            raise RefusedError(404, error, code="model_not_found", param="model") from error

    def by_client(self, owner: str) -> dict[str, list[ModelName]]:
        """Return the models that an owner may call, by client, the most personal one last."""
        return {client: [*group] for client, group in groupby(self.models(owner), lambda model: model.client)}


class Turns:
    """Turns at something that only one caller can use at a time; used only on the event loop's thread.

    The owners of keys take turns: of each owner's callers only the first waits for its turn, the others behind it.
    """

    def __init__(self) -> None:
        self._owners: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turn = asyncio.Lock()  # asyncio's locks are first come, first served

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Wait for an owner's turn, and hold it inside the block."""
        async with self._owners[owner], self._turn:
            yield


_RETRY_AFTER = 2
"""Seconds after which a refused caller may try again."""


class Load:
    """Counter of the requests in progress by key owner; used only on the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._active: Counter[str] = Counter()

    def take(self, owner: str, queued: int) -> None:
        """Take a place; ``leave`` gives it back.

        Args:
            owner: Owner of the caller's key.
            queued: Number of requests that already wait.
        """
        if queued >= self._limits.queue:
            raise later(429, f"{queued} waiting requests", "the queue is full", "queue_full", _RETRY_AFTER)
        if owner != OPERATOR and self._active[owner] >= self._limits.per_client:
            raise later(
                429,
                f"{self._active[owner]} requests in progress",
                f"one client may have at most {self._limits.per_client}",
                "rate_limit_exceeded",
                _RETRY_AFTER,
            )
        self._active[owner] += 1

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self._active[owner] -= 1
