"""What is no request, or one that must be refused: as bytes, with the status of the answer."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

COMPLETIONS = "/v1/completions"


class Broken(NamedTuple):
    """Bytes for a connection; `counted` is the route under which the server counts them, None where there is none."""

    name: str
    content: bytes
    status: int
    counted: str | None = None
    method: str = "POST"


def post(path: str, body: bytes, *headers: str, media: str = "application/json") -> bytes:
    """A request whose connection is closed after it."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: soak",
        "Connection: close",
        f"Content-Type: {media}",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _completion(name: str, **fields: Any) -> Broken:
    return _body(name, json.dumps({"prompt": "The sea", "max_tokens": 4, **fields}).encode())


def _body(name: str, body: bytes) -> Broken:
    return Broken(name, post(COMPLETIONS, body), 400, COMPLETIONS)


BROKEN = [
    Broken("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400),
    Broken("a head without an end", b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000, 431),
    Broken(
        "two lengths",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        400,
    ),
    Broken("too many headers", post(COMPLETIONS, b"{}", *(f"x-{i}: 1" for i in range(200))), 431, "other"),
    Broken("no such route", post("/v1/complete", b"{}"), 404, "other"),
    Broken(
        "a wrong method",
        b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        405,
        COMPLETIONS,
        "GET",
    ),
    Broken("a body beyond the limit", post(COMPLETIONS, b"")[:-5] + b"9999999\r\n\r\n", 413, "other"),
    _body("no JSON", b"{'prompt': 'a'}"),
    _body("half of an object", b'{"prompt": "The sea", "max_tok'),
    _body("no object", b"[1, 2, 3]"),
    _body("no UTF-8", b'{"prompt": "\xff\xfe\xfd"}'),
    _body("an endless number", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"),
    _body("depth", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _body("a name twice", b'{"prompt": "a", "prompt": "b"}'),
    _body("not a number", b'{"prompt": "a", "temperature": NaN}'),
    _completion("a negative length", max_tokens=-1),
    _completion("a context that is too long", max_tokens=100_000),
    _completion("an unknown field", max_token=4),
    _completion("a wrong type", temperature="warm"),
    _completion("a token that is none", prompt=[1, 2, 4_000_000]),
    _completion("a crash of a compiler", structured_outputs={"json": {"const": -9223372036854775807}}),
    _completion("an expression that is none", structured_outputs={"regex": "(["}),
    Broken("no model", post(COMPLETIONS, b'{"prompt": "a", "model": "other"}'), 404, COMPLETIONS),
    Broken(
        "lines that are none",
        post("/v1/perplexity?stream=true", b'{"text": 3}\n"The sea"\n', media="application/x-ndjson"),
        400,
        "/v1/perplexity",
    ),
    Broken("a form that is none", post("/v1/files", b"no form", media="multipart/form-data"), 400, "/v1/files"),
    Broken("a purpose that is none", post("/v1/batches", b'{"input_file_id": "a"}'), 400, "/v1/batches"),
]
