"""GET / and /playground/*: a static page that talks to the API.

The files are read once, at import: they are small, and the paths must be known to let them through without an API key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "cache-control": "no-cache",  # kept by the browser, but asked for each time: an answer without a body, mostly
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _read() -> dict[str, Response]:
    """Path to answer, of every file of the page."""
    found: dict[str, Response] = {}
    for file in files("server").joinpath("playground").iterdir():
        suffix = file.name.rpartition(".")[2]
        if suffix not in MEDIA_TYPES:  # what an editor leaves behind
            continue
        body = file.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        path = "/" if file.name == "index.html" else f"/playground/{file.name}"
        media_type = f"{MEDIA_TYPES[suffix]}; charset=utf-8"
        found[path] = Response(body, headers={**HEADERS, "etag": etag}, media_type=media_type)
    return found


ANSWERS = _read()
PLAYGROUND_PATHS = frozenset(ANSWERS)
"""Hold no secret, and a browser cannot send a key with them."""


def playground_router() -> APIRouter:
    """The routes of the page."""
    router = APIRouter(include_in_schema=False)
    for path, answer in ANSWERS.items():
        router.add_api_route(path, _serve(answer), methods=["GET", "HEAD"])
    return router


def _serve(answer: Response) -> Callable[[Request], Response]:
    def serve(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if answer.headers["etag"] in known:
            return Response(status_code=304, headers={**HEADERS, "etag": answer.headers["etag"]})
        return answer

    return serve
