"""The files of a page, sent with headers that forbid the browser all that the page does not need."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(package: str) -> list[Route]:
    """Return the routes of the three files in a package's folder ``page``, and of the icon that all pages share."""
    icon = _route("/icon.svg", "flexperts.serving", "icon.svg", "image/svg+xml")
    return [*(_route(path, package, *file) for path, file in _FILES.items()), icon]


def _route(path: str, package: str, name: str, kind: str) -> Route:
    content = files(package).joinpath("page", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return Route(path, send)
