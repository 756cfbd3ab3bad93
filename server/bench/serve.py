"""Streamed completions, timed piece by piece."""

from __future__ import annotations

import json
import time

from server.bench.client import Client, RequestFailed
from server.bench.load import Send, Timing


def complete(output_len: int, model: str) -> Send:
    """Streamed completions of exactly `output_len` tokens."""

    async def send(client: Client, text: list[int], timing: Timing) -> None:
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = last = time.perf_counter()
        rest, pieces, usage, ended = b"", 0, None, False
        async for data in client.request("POST", "/v1/completions", body):
            now = time.perf_counter()
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
                        timing.gaps.append(now - last)
                    else:
                        timing.first = now - started
                    pieces, last = pieces + 1, now
        if not ended:
            raise RequestFailed("the stream ended without [DONE]")
        timing.output_tokens = pieces if usage is None else usage["completion_tokens"]
        if timing.output_tokens != output_len:
            raise ValueError(f"{timing.output_tokens} tokens came, {output_len} were asked for")

    return send
