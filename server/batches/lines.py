"""The lines of a batch's input file, as OpenAI's Batch API has them: one request each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from server.errors import UserError
from server.protocol.batches import Endpoint
from server.routes.body import parse_json

ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100  # that a batch's document lists


@dataclass(frozen=True)
class Line:
    """A request of a batch. `body` is the JSON that its endpoint gets."""

    number: int  # from 1, blank lines counted
    custom_id: str
    endpoint: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LineError:
    """Why a line, or with the number None a whole batch, is none; in OpenAI's words."""

    code: str
    message: str
    number: int | None
    param: str | None = None

    def document(self) -> dict[str, Any]:
        """An entry of a batch's `errors.data`."""
        return {"code": self.code, "message": self.message, "line": self.number, "param": self.param}


def read_lines(path: Path, endpoint: str | None, max_line_bytes: int, max_values: int) -> Iterator[Line | LineError]:
    """The lines of a file in order, blank ones left out. One that is wrong is a LineError, and reading goes on.

    Args:
        endpoint: what every line must name as its url; None: any of ENDPOINTS.
        max_line_bytes, max_values: of a line, as a server limits its bodies.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 2):
            number += 1
            if len(line.rstrip(b"\r\n")) > max_line_bytes:
                while line and not line.endswith(b"\n"):
                    line = file.readline(max_line_bytes)
                yield LineError("line_too_long", f"the line has more than {max_line_bytes} bytes", number)
            elif line.strip():
                yield _read(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number, endpoint, max_values)


def _read(line: bytes, number: int, endpoint: str | None, max_values: int) -> Line | LineError:
    def wrong(code: str, message: str, param: str | None = None) -> LineError:
        return LineError(code, message, number, param)

    try:
        value = parse_json(line, max_values)
    except json.JSONDecodeError as error:
        return wrong("invalid_json_line", f"the line is not valid JSON: {error.msg} at character {error.pos}")
    except UserError as error:
        return wrong("invalid_json_line", error.message, error.param)
    if not isinstance(value, dict):
        return wrong("invalid_json_line", "the line is no JSON object")
    if unknown := value.keys() - {"custom_id", "method", "url", "body"}:
        name = min(unknown)[:64]
        return wrong("unknown_parameter", f"{name}: is no field of a batch's line", name)
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        return wrong("invalid_custom_id", f"custom_id: must be a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    if value.get("method") != "POST":
        return wrong("invalid_method", "method: must be POST", "method")
    if url not in ENDPOINTS:
        return wrong("invalid_url", f"url: must be one of {', '.join(ENDPOINTS)}", "url")
    if endpoint is not None and url != endpoint:
        return wrong("mismatched_url", f"url: is not the batch's endpoint, {endpoint}", "url")
    if not isinstance(body, dict):
        return wrong("missing_body", "body: must be a JSON object", "body")
    if body.get("stream"):
        return wrong("unsupported_stream", "body.stream: a batch's lines are answered whole", "body.stream")
    if url == "/v1/responses" and body.get("store") is not False:  # they would push others' out of the memory
        return wrong("unsupported_store", "body.store: must be false, the answer is in the output file", "body.store")
    return Line(number, custom_id, url, body)
