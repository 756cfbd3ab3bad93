"""POST /v1/hidden_states.

A text's positions are computed in parts of bounded size, and a bounded number of parts at a time: a reader that does
not keep up holds the next ones back, however much is wanted.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.engine.async_engine import AsyncEngine
from server.engine.hidden_states import Floats, HiddenSpec
from server.errors import InvalidRequest
from server.protocol.hidden_states import (
    HiddenStatesRequest,
    HiddenStatesResponse,
    Part,
    Wanted,
    answer_fields,
    entry_fields,
    layers_of,
    parts_of,
    positions_of,
    safetensors_head,
)
from server.protocol.safetensors import SAFETENSORS
from server.routes.body import JsonRoute
from server.routes.described import WITH_ENGINE, responses
from server.routes.limits import check_count
from server.routes.ndjson import NDJSON
from server.routes.prompts import check_model, tokenize_whole
from server.routes.respond import JsonPieces, deadline_of, to_json, while_connected
from server.routes.scoring import Scorer
from server.routes.stream import binary_stream, line_stream
from server.settings import Settings

PART_BYTES = 16 << 20  # of numbers: the most in a part, a line of a stream, or an answer that is no stream
IN_FLIGHT_BYTES = 64 << 20  # of the parts of a request that are computed, or wait for a reader
PIECE = 3 << 16  # bytes that are written or encoded at once; a multiple of 3, so that base64 needs no padding


MEDIA_TYPES = {
    "responses": {
        "200": {
            "content": {
                NDJSON: {
                    "schema": {"type": "string"},
                    "example": '{"object":"hidden_states","index":0}\n{"object":"list"}\n',
                },
                SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
            }
        }
    }
}
"""Of the answer, with `stream` and with `encoding_format` safetensors, beside JSON."""


def hidden_states_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """The route over one engine."""
    router = APIRouter(tags=["Scoring"], route_class=JsonRoute)

    @router.post(
        "/v1/hidden_states",
        summary="Hidden states of texts",
        responses=responses(HiddenStatesResponse, *WITH_ENGINE),
        openapi_extra=MEDIA_TYPES,
    )
    async def hidden_states(body: HiddenStatesRequest, request: Request) -> Response:
        """The model's residual stream at chosen layers and positions, float32."""
        check_model(body.model, settings)
        check_count("input", "texts", len(body.input), settings.max_sequences, "max_sequences")
        call = await _accept(engine, settings, body, request.state.request_id)
        if body.encoding_format == "safetensors":
            head = await asyncio.to_thread(call.head)
            return binary_stream(_file(call, head), len(head) + call.num_bytes)
        if body.stream:
            return line_stream(_lines(call), request.receive)
        if call.num_bytes > PART_BYTES:
            raise InvalidRequest(
                f"input: its hidden states have {call.num_bytes} bytes, more than {PART_BYTES}, the most in an answer; "
                'take "stream": true, or "encoding_format": "safetensors"',
                param="input",
            )
        return JsonPieces(await while_connected(request.receive, _whole(call)))

    return router


@dataclass
class _Call:
    """A checked request."""

    scorer: Scorer
    wanted: list[Wanted]
    layers: tuple[int, ...]
    width: int
    block_size: int
    answer: dict[str, Any]  # without data
    deadline: float | None

    @property
    def row_bytes(self) -> int:
        """Of a position."""
        return 4 * len(self.layers) * self.width

    @property
    def num_bytes(self) -> int:
        """Of all numbers."""
        return self.row_bytes * sum(len(text.positions) for text in self.wanted)

    def head(self) -> bytes:
        """Of the safetensors file."""
        metadata = {name: str(self.answer[name]) for name in ("model", "system_fingerprint", "layers")}
        return safetensors_head(self.wanted, self.layers, self.width, metadata)

    def rows(self) -> AsyncGenerator[tuple[Part, Floats]]:
        """Every part with its numbers [positions, layers, width], in order."""
        most = max(1, PART_BYTES // self.row_bytes)
        largest = min(most, max(len(text.positions) for text in self.wanted)) * self.row_bytes
        jobs = self._jobs(parts_of(self.wanted, most, self.block_size))
        return self.scorer.in_order(jobs, self.deadline, max(1, IN_FLIGHT_BYTES // largest))

    async def _jobs(self, parts: Iterator[Part]) -> AsyncGenerator[Coroutine[Any, Any, tuple[Part, Floats]]]:
        for part in parts:
            yield self._compute(part)

    async def _compute(self, part: Part) -> tuple[Part, Floats]:
        spec = HiddenSpec(layers=self.layers, positions=part.positions)
        return part, await self.scorer.hidden_states(self.wanted[part.index].token_ids, spec)


async def _accept(engine: AsyncEngine, settings: Settings, body: HiddenStatesRequest, request_id: str) -> _Call:
    """Refuse what the model cannot do."""
    config = engine.model_config
    layers = layers_of(body.layers, config.num_hidden_layers)
    prompts = await tokenize_whole(engine, body.input, body.add_special_tokens)

    def choose() -> list[Wanted]:
        return [
            Wanted(prompt.where, prompt.token_ids, positions_of(body.positions, len(prompt.token_ids), prompt.where))
            for prompt in prompts
        ]

    wanted = await asyncio.to_thread(choose)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return _Call(
        Scorer(engine, settings, request_id),
        wanted,
        layers,
        config.hidden_size,
        settings.block_size,
        answer_fields(settings.model_name, engine.fingerprint, layers, tokens),
        deadline_of(settings),
    )


async def _whole(call: _Call) -> list[bytes]:
    """One JSON object."""
    pieces = [f'{to_json(call.answer)[:-1]},"data":['.encode()]
    async with aclosing(call.rows()) as rows:
        async for part, numbers in rows:
            entry = await asyncio.to_thread(_entry, call, part, numbers)
            pieces += [b",", *entry] if part.index else entry
    return [*pieces, b"]}"]


async def _lines(call: _Call) -> AsyncGenerator[str | list[bytes]]:
    """JSON of each part, then of the answer without data."""
    async with aclosing(call.rows()) as rows:
        async for part, numbers in rows:
            yield await asyncio.to_thread(_entry, call, part, numbers)
    yield to_json(call.answer)


async def _file(call: _Call, head: bytes) -> AsyncGenerator[Iterable[bytes]]:
    """A safetensors file. Its head comes with the first numbers, so that an error before them has its own status."""
    async with aclosing(call.rows()) as rows:
        async for _, numbers in rows:
            yield (head, *_pieces(numbers)) if head else _pieces(numbers)
            head = b""


def _entry(call: _Call, part: Part, numbers: Floats) -> list[bytes]:
    """The JSON of a part in pieces."""
    fields = to_json(entry_fields(part, call.wanted[part.index], numbers.shape))
    encoded = (base64.b64encode(piece) for piece in _pieces(numbers))
    return [f'{fields[:-1]},"data":"'.encode(), *encoded, b'"}']


def _pieces(numbers: Floats) -> Iterator[bytes]:
    """The bytes of numbers, some at a time."""
    view = numbers.astype("<f4", copy=False).data.cast("B")
    for start in range(0, len(view), PIECE):
        yield bytes(view[start : start + PIECE])
