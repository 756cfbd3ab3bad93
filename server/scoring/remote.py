"""Texts scored by a running server: one connection to /v1/perplexity, texts and answers on it at the same time."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from server.client import Client, RequestFailed
from server.scoring.texts import Advance, OnTokens, Source


def score_texts(
    url: str,
    api_key: str | None,
    asked: dict[str, Any],
    texts: Iterable[tuple[Source, str]],
    advance: Advance,
    on_tokens: OnTokens | None = None,
) -> Iterator[dict[str, Any]]:
    """The lines of the answer to `texts`, each text's with its "file" and "line". Texts are read as the server takes
    them, and it takes them as its answers are.

    Args:
        url: a server's root, with or without /v1.
        asked: parameters of /v1/perplexity without the texts; None is for its default, also for `model`, which then
            is the first that the server lists.

    Raises:
        RequestFailed, ValueError: the message names the text, if it is about one.
    """
    answers = _answers(url, api_key, {**asked, "return_tokens": on_tokens is not None}, texts, advance, on_tokens)

    async def following() -> dict[str, Any] | None:
        return await anext(answers, None)

    with asyncio.Runner() as runner:
        try:
            while (line := runner.run(following())) is not None:
                yield line
        finally:
            runner.run(answers.aclose())


async def _answers(
    url: str,
    api_key: str | None,
    asked: dict[str, Any],
    texts: Iterable[tuple[Source, str]],
    advance: Advance,
    on_tokens: OnTokens | None,
) -> AsyncGenerator[dict[str, Any]]:
    client = Client(url, api_key=api_key)
    waiting: deque[Source] = deque()  # sent, not yet answered
    count = 0  # answered

    def lines() -> Iterator[bytes]:
        for source, text in texts:
            waiting.append(source)
            yield json.dumps(text).encode() + b"\n"

    complete = False
    try:
        query = {name: json.dumps(value) for name, value in asked.items() if isinstance(value, bool | int)}
        query |= {name: asked[name] for name in ("unit", "region_separator") if asked.get(name) is not None}
        query |= {"model": asked["model"] or await client.model_name(), "method": asked["method"], "stream": "true"}
        async with aclosing(client.pieces("POST", "/v1/perplexity", query=query, lines=lines())) as pieces:
            async for answer in lines_of(pieces):
                line = _parse(answer, url)
                if "error" in line:
                    raise RequestFailed(line["error"]["message"], line["error"]["message"])
                complete = line["object"] == "perplexity"
                if not complete:
                    if not waiting:
                        raise RequestFailed(f"{url}: the answer has more texts than were sent")
                    source = waiting.popleft()
                    count += 1
                    advance(source.size, line["num_tokens"])
                    if on_tokens is not None:
                        on_tokens(source, line.pop("tokens"))
                    line = {**source.fields(), **line}
                yield line
    except RequestFailed as error:
        if error.told is None:
            raise
        start, colon, message = error.told.partition(": ")
        number = start.removeprefix("line ")
        if colon and start != number and number.isdecimal() and 0 < int(number) - count <= len(waiting):
            raise RequestFailed(f"{waiting[int(number) - count - 1]}: {message}") from None
        raise RequestFailed(error.told) from None
    finally:
        await client.close()
    if not complete:
        raise RequestFailed(f"{url}: the answer ended before its last line")


async def lines_of(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The lines of a body that comes in pieces, each of which ends."""
    begun: list[bytes] = []
    async for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        for other in others:
            yield b"".join(begun)
            begun = [other]


def _parse(line: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & {"object", "error"}:
        raise RequestFailed(f"{url}: not an answer of /v1/perplexity: {line[:200].decode(errors='replace')}")
    return found
