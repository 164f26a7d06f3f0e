"""POST /v1/chat/completions: from a request's bytes to the answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flexperts.errors import DataError, FlexpertsError
from flexperts.serving.contract import ModelName
from flexperts.serving.http.delivery import Delivery
from flexperts.serving.http.openai import ALIVE, DONE, ChatRequest, Completion, event, parse_chat, usage
from flexperts.serving.http.refusals import RefusedError, refused
from flexperts.serving.http.service import Service

GONE = 499
"""Status that is counted where the caller left before the answer; it is not sent to anyone."""
_PATIENCE = 30
"""Seconds within which a request's body must arrive."""
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx then forwards events unbuffered

log = logging.getLogger(__name__)


async def complete(service: Service, request: Request) -> Response:
    """Answer one chat request.

    Raises:
        RefusedError: The request is refused.
    """
    label = ""
    try:
        owner = service.owner(request)
        service.load.take(owner, service.engine.queue_length)
        try:
            wanted = parse_chat(await _body(request, service.limits.body_bytes))
            model = service.model(wanted.model, owner)
            label = str(model)
            answer = await _delivery(service, owner, model, wanted)
        except BaseException as error:
            service.load.leave(owner)
            if isinstance(error, FlexpertsError):
                raise refused(error) from error
            raise
        if wanted.stream:
            return EventStream(service, answer, wanted.include_usage)
        whole = await _unless_gone(request, answer)
    except RefusedError as refusal:
        _count(service, label, refusal.status)
        raise
    except ClientDisconnect:
        _count(service, label, GONE)
        return Response(status_code=GONE)
    except Exception:
        _count(service, label, 500)
        raise
    _count(service, label, 200)
    return whole


class EventStream(StreamingResponse):
    """An answer as server-sent events; when the reader disconnects, the request ends.

    Args:
        service: The service whose metrics count the request.
        answer: The answer in progress.
        counts: Whether token counts follow the last part.
    """

    def __init__(self, service: Service, answer: Delivery, counts: bool) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._service, self._answer, self._counts, self._status = service, answer, counts, GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; in any case, the engine stops working on it afterwards."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
            _count(self._service, str(self._answer.model), self._status)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._parts(Completion(str(self._answer.model))):
                yield part
            self._status = 200
            yield DONE
        except RefusedError as refusal:  # the status is already sent, so the error becomes an event
            self._status = refusal.status
            yield event(refusal.body)

    async def _parts(self, reply: Completion) -> AsyncIterator[bytes]:
        yield event(reply.chunk({"role": "assistant", "content": ""}))
        async for piece in self._answer.pieces():
            if piece is None:
                yield ALIVE
                continue
            if piece.text:
                yield event(reply.chunk({"content": piece.text}))
            if piece.finish:
                yield event(reply.chunk({}, piece.finish))
        if self._counts:
            yield event(reply.counts(usage(self._answer.prompt_tokens, self._answer.tokens)))


async def _delivery(service: Service, owner: str, model: ModelName, wanted: ChatRequest) -> Delivery:
    """Submit a request to the engine; its place is free again when the engine has ended it."""
    sampling, engine = wanted.sampling(service.limits), service.engine
    _check_length(wanted.bytes, service.limits.longest_prompt(engine.context_length), "bytes")
    async with service.tokenizing.of(owner):
        prompt = await run_in_threadpool(engine.prompt_tokens, wanted.conversation, model)
    _check_length(len(prompt), service.limits.prompt_tokens, "tokens")
    return Delivery(
        engine,
        model,
        prompt,
        sampling,
        seconds=service.limits.seconds,
        metrics=service.metrics,
        on_end=lambda: service.load.leave(owner),
    )


def _check_length(prompt: int, most: int | None, unit: str) -> None:
    if most is not None and prompt > most:
        raise DataError(
            f"a prompt of {prompt} {unit}", f"this server accepts at most {most}", "shorten the messages"
        )


async def _unless_gone(request: Request, answer: Delivery) -> Response:
    """Return the whole answer; cancel it when the caller disconnects."""
    collecting, leaving = asyncio.create_task(_whole(answer)), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        return collecting.result()
    finally:
        collecting.cancel()
        leaving.cancel()
        answer.cancel()


async def _whole(answer: Delivery) -> Response:
    text, finish = "", ""
    async for piece in answer.pieces():
        if piece is not None:
            text, finish = text + piece.text, piece.finish or ""
    counts = usage(answer.prompt_tokens, answer.tokens)
    return JSONResponse(Completion(str(answer.model)).whole(text, finish, counts))


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes:
    """Return a request's body."""
    body = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    error = DataError("the request's body", f"it may have at most {most} bytes", "shorten it")
                    raise RefusedError(413, error, code="request_too_large", headers={"Connection": "close"})
    except TimeoutError as error:
        slow = DataError("the request's body", f"it must arrive within {_PATIENCE} s", "send it without pauses")
        raise RefusedError(408, slow, code="timeout") from error
    return bytes(body)


def _count(service: Service, model: str, status: int) -> None:
    service.metrics.request(model, status)
    log.info("%s %d", model or "-", status)
