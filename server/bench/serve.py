"""Streamed completions, timed piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from server.bench.load import Send, Timing
from server.client import Client, RequestFailed


def complete(output_len: int, model: str) -> Send:
    """Streamed completions of exactly `output_len` tokens."""

    async def send(client: Client, text: list[int], timing: Timing) -> Callable[[], None]:
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrivals: list[tuple[float, bytes]] = []
        started = time.perf_counter()
        async for piece in client.pieces("POST", "/v1/completions", body):
            arrivals.append((time.perf_counter() - started, piece))

        def read() -> None:
            read_stream(arrivals, timing)
            if timing.output_tokens != output_len:
                raise ValueError(f"{timing.output_tokens} tokens came, {output_len} were requested")

        return read

    return send


def read_stream(arrivals: Sequence[tuple[float, bytes]], timing: Timing) -> None:
    """What a streamed answer says, cut anywhere into pieces: (seconds since its request, bytes).

    Raises:
        RequestFailed: it has an error, or no end.
        ValueError: an event is no JSON.
    """
    rest, pieces, usage, last, ended = b"", 0, None, 0.0, False
    for at, data in arrivals:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                ended = True
                continue
            event = json.loads(content)
            if "error" in event:
                raise RequestFailed(str(event["error"]))
            usage = event.get("usage") or usage
            if event.get("choices"):
                if pieces:
                    timing.gaps.append(at - last)
                else:
                    timing.first = at
                pieces, last = pieces + 1, at
    if not ended:
        raise RequestFailed("the stream ended without [DONE]")
    timing.output_tokens = pieces if usage is None else usage["completion_tokens"]
