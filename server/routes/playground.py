"""GET / and /playground/*: a static page that talks to the API.

The files are read once, at import: they are small, and the paths must be known to let them through without an API key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "cache-control": "no-cache",  # cached by the browser, but revalidated each time: mostly a 304
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """A file of the page as it is sent; `etag` with its quotes."""

    body: bytes
    media_type: str
    etag: str


def _read() -> dict[str, File]:
    """URL path to file."""
    found: dict[str, File] = {}
    for file in files("server").joinpath("playground").iterdir():
        kind = file.name.rpartition(".")[2]
        if kind not in MEDIA_TYPES:  # what an editor leaves behind
            continue
        body = file.read_bytes()
        path = "/" if file.name == "index.html" else f"/playground/{file.name}"
        found[path] = File(
            body, f"{MEDIA_TYPES[kind]}; charset=utf-8", etag=f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        )
    return found


FILES = _read()
PLAYGROUND_PATHS = frozenset(FILES)
"""Need no API key: they hold no secret, and a browser that opens a page has none to send."""


def playground_router() -> APIRouter:
    """The routes of the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get("/playground/{name}")
    def send(request: Request, name: str = "") -> Response:
        if (file := FILES.get(f"/playground/{name}" if name else "/")) is None:
            raise HTTPException(404)
        headers = {**HEADERS, "etag": file.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)

    return router
