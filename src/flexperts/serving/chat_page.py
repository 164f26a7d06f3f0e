"""The chat page: three files that load nothing from elsewhere, under a policy that forbids them to."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """Return the routes of the page's files."""
    return [_route(path, *file) for path, file in _FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    content = files("flexperts.serving").joinpath("page", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, send)
