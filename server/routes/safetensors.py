"""Texts' log-probabilities as safetensors files, written while they are computed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive

from lpa_model.perplexity import Convention
from server.engine.async_engine import AsyncEngine
from server.engine.request import Logprobs, Measures
from server.errors import EngineError, InvalidRequest
from server.protocol.safetensors import SAFETENSORS, Tensor, header
from server.routes.limits import FEW
from server.routes.respond import deadline_of
from server.routes.scoring import Scorer
from server.routes.stream import Stream
from server.scoring.perplexity import Piece, Text, pieces
from server.settings import Settings

SLICE = 1 << 22  # log-probabilities of whole rows that are computed and held at once: 16 MiB
MAX_KEPT = 1 << 24  # ids of a text's most probable tokens, which wait until its log-probabilities are sent: 64 MiB
PIECE = 1 << 18  # bytes

Part = tuple[Piece, Logprobs, bool]
"""Scores of some of a piece's tokens, and whether they are its last ones."""


def wants_safetensors(headers: Headers) -> bool:
    """Whether the Accept header names such files."""
    ranges = (part.partition(";")[0].strip().lower() for part in headers.get("accept", "").split(","))
    return SAFETENSORS in ranges


def safetensors_stream(
    texts: AsyncGenerator[Text],
    engine: AsyncEngine,
    settings: Settings,
    request: Request,
    convention: Convention,
    top: int,
    field: str,
    *,
    receive: Receive | None = None,
    priority: int = 0,
    cache_salt: str = "",
) -> Stream:
    """A file for each text, one after another, with a row for each of the n tokens that are scored, in order:

    logprobs        float32 [n, k]: of the most probable tokens, best first; of all tokens by id, if `top` is -1
    ids             uint32 [n, k]: those tokens; [vocab] if `top` is -1
    tokens          uint32 [n]: the text's own
    positions       uint32 [n]: where they stand in the text, from 0
    token_logprobs  float32 [n]: theirs
    ranks           uint32 [n]: theirs, from 1

    Nothing else of a text's distributions is held than what is being computed and sent.

    Args:
        top: how many of the most probable tokens; -1: all tokens.
        field: the request's field that says so, for messages.
        receive: in the place of the request's own.
    """
    vocab_size = engine.tokenizer.vocab_size
    top = min(top, vocab_size)
    entries = SLICE if top < 0 else convention.max_length * top if top > FEW else 0
    scorer = Scorer(
        engine, settings, request.state.request_id, entries=entries, priority=priority, cache_salt=cache_salt
    )
    metadata = {"model": settings.model_name, "system_fingerprint": engine.fingerprint}
    metadata |= {name: json.dumps(value) for name, value in asdict(convention).items()}
    parts = scorer.in_order(_jobs(texts, scorer, convention, top, vocab_size, field), deadline_of(settings))
    files = _files(parts, convention, top, vocab_size, metadata)
    return Stream(files, SAFETENSORS, lambda piece: piece, receive, tells_errors=False)


async def _jobs(
    texts: AsyncGenerator[Text], scorer: Scorer, convention: Convention, top: int, vocab_size: int, field: str
) -> AsyncGenerator[Coroutine[Any, Any, Part]]:
    """The scoring of every text, window by window; those of whole rows in slices, each after what is before it."""
    most = max(1, SLICE // vocab_size) if top < 0 else scorer.max_model_len
    measures = Measures(rows=True) if top < 0 else Measures(top)
    async with aclosing(texts):
        async for text in texts:
            cut = list(pieces(text, convention, scorer.max_model_len))
            count = sum(0 if piece.window is None else piece.window.num_scored for piece in cut)
            if top > 0 and count * top > MAX_KEPT:
                raise InvalidRequest(
                    f"{field}: {top} tokens in {count} places of {text.where} are more than {MAX_KEPT}; take fewer, or "
                    "-1, or shorter texts",
                    param=field,
                )
            for piece in cut:
                if piece.window is None:
                    yield _nothing(piece)
                    continue
                ids, first = piece.sequence()
                for start in range(first, len(ids), most):
                    end = min(start + most, len(ids))
                    yield _score(scorer, piece, ids[:end], start, measures, end == len(ids))


async def _nothing(piece: Piece) -> Part:
    return piece, Logprobs(), True


async def _score(scorer: Scorer, piece: Piece, ids: list[int], first: int, measures: Measures, is_last: bool) -> Part:
    scores, _ = await scorer.score(ids, first, measures)
    return piece, scores, is_last


async def _files(
    parts: AsyncGenerator[Part], convention: Convention, top: int, vocab_size: int, metadata: Mapping[str, str]
) -> AsyncGenerator[list[bytes]]:
    number = 0
    file: _File | None = None
    async with aclosing(parts):
        async for piece, scores, is_last in parts:
            if file is None:
                file = _File(piece.text, convention, top, vocab_size)
                yield [file.header({**metadata, "index": str(number)})]
            yield await asyncio.to_thread(file.add, piece, scores)
            if is_last and piece.is_last:
                yield await asyncio.to_thread(file.rest)
                file, number = None, number + 1


class _File:
    """The file of one text."""

    def __init__(self, text: Text, convention: Convention, top: int, vocab_size: int) -> None:
        windows = (piece.window for piece in pieces(text, convention, convention.max_length))
        runs = [(window.first_scored, window.end) for window in windows if window is not None]
        self._text, self._top, self._vocab_size = text, top, vocab_size
        self._positions = np.concatenate([np.arange(0), *(np.arange(*run) for run in runs)]).astype("<u4")
        self._ids: list[bytes] = []
        self._logprobs: list[bytes] = []
        self._ranks: list[bytes] = []

    def header(self, metadata: Mapping[str, str]) -> bytes:
        count = len(self._positions)
        wide = self._vocab_size if self._top < 0 else self._top
        ids = (self._vocab_size,) if self._top < 0 else (count, wide)
        tensors: dict[str, Tensor] = {
            "logprobs": ("F32", (count, wide)),
            "ids": ("U32", ids),
            "tokens": ("U32", (count,)),
            "positions": ("U32", (count,)),
            "token_logprobs": ("F32", (count,)),
            "ranks": ("U32", (count,)),
        }
        return header(tensors, metadata)

    def add(self, piece: Piece, scores: Logprobs) -> list[bytes]:
        """The next rows of log-probabilities."""
        own = np.array(scores.logprobs, "<f4")
        if not np.isfinite(own).all():
            raise EngineError(f"{piece.text.where}: the model gave a log-probability that is not a finite number")
        self._logprobs.append(own.tobytes())
        self._ranks.append(np.array(scores.ranks, "<u4").tobytes())
        if self._top < 0:
            return list(_cut(row.astype("<f4", copy=False).tobytes() for row in scores.rows if row is not None))
        self._ids.append(np.array(scores.top_ids, "<u4").tobytes())
        return list(_cut([np.array(scores.top_logprobs, "<f4").tobytes()]))

    def rest(self) -> list[bytes]:
        """What follows the log-probabilities."""
        ids = [np.arange(self._vocab_size, dtype="<u4").tobytes()] if self._top < 0 else self._ids
        tokens = np.asarray(self._text.token_ids)[self._positions].astype("<u4").tobytes()
        return list(_cut([*ids, tokens, self._positions.tobytes(), *self._logprobs, *self._ranks]))


def _cut(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, at most PIECE at a time."""
    for part in parts:
        for start in range(0, len(part), PIECE):
            yield part[start : start + PIECE]
