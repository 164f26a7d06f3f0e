"""The HTTP application: OpenAI's endpoints for chat, health and metrics, and the page."""

from __future__ import annotations

import logging
import traceback

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flexperts.errors import ConfigError, ServingError
from flexperts.serving.http import chat
from flexperts.serving.http.openai import model_entry
from flexperts.serving.http.page_files import page_routes
from flexperts.serving.http.refusals import RefusedError
from flexperts.serving.http.service import Service

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)


def make_app(service: Service) -> Starlette:
    """Return the application of one server.

    Args:
        service: The service; its engine may be added later.
    """
    endpoints = _Endpoints(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{model}", endpoints.model),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
            *page_routes("flexperts.serving"),
        ],
        exception_handlers={RefusedError: _refusal, HTTPException: _no_endpoint},
        middleware=[Middleware(_Waiting, service)],
    )


class _Waiting:
    """Tells the door which connections wait: those whose request shows no key, and those whose answer has ended."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (door := self._service.door) is None:
            return await self._app(scope, receive, send)
        door.wait(scope["client"])
        try:
            await self._app(scope, receive, send)
        finally:
            door.wait(scope["client"])


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        try:
            return await chat.complete(self._service, request)
        except RefusedError:
            raise
        except Exception as error:
            # Neither its message nor its cause is logged: both may quote a prompt.
            log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            raise RefusedError(
                500, ServingError("this request", "the server failed", "tell the server's operator")
            ) from None

    async def models(self, request: Request) -> Response:
        found = self._service.by_client(self._service.owner(request))
        data = [model_entry(client, states, self._service.since) for client, states in found.items()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        owner, name = self._service.owner(request), request.path_params["model"]
        client = self._service.model(name, owner).client
        return JSONResponse(model_entry(name, self._service.by_client(owner)[client], self._service.since))

    async def health(self, request: Request) -> Response:
        status = self._service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        self._service.check_operator(self._service.owner(request))
        return Response(self._service.metrics.text(), media_type=_METRICS_TYPE)


async def _refusal(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, RefusedError)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _no_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = ConfigError(f"{request.method} {request.url.path[:200]}", error.detail, "see docs/serving.md")
    return await _refusal(request, RefusedError(error.status_code, what, headers=error.headers))
