"""What a batch takes from streams beside it: rounds of streams alone and beside a running batch, by turns."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from server.bench.local import local_server
from server.bench.overhead import drive
from server.settings import Settings

LINES = 20_000  # of a batch: more than a round answers
WARM = 1.0  # seconds that a batch runs before streams come


def bench_batches(
    settings: Settings,
    *,
    streams: int,
    input_len: int,
    output_len: int,
    rounds: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Inter-token latencies of `streams` completions, from another process, alone and beside a batch of completions of
    the same lengths: for `median` and `p99` the medians of the rounds in milliseconds, and of their ratios with the
    lowest and highest; and what the batch got through meanwhile, in tokens a second.

    Raises:
        ValueError: the server did not start, or a request failed.
    """
    with TemporaryDirectory() as folder:
        of_batches = {"data_dir": Path(folder), "log_requests": False}
        with local_server(settings.model_copy(update=of_batches)) as local:
            vocab = local.server.engine.model_config.vocab_size
            lines = _lines(settings.model_name, vocab, input_len, output_len)
            alone: list[dict[str, float]] = []
            beside: list[dict[str, float]] = []
            rates: list[float] = []

            def gaps() -> dict[str, float]:
                found: dict[str, float] = drive(local.url, vocab, streams, input_len, output_len)["inter_token_ms"]
                return found

            for number in range(rounds + 1):
                on_round(number)
                for with_batch in (False, True) if number % 2 else (True, False):
                    if with_batch:
                        batch_id = asyncio.run(_start(local.url, lines))
                        began, before = time.perf_counter(), asyncio.run(_completed(local.url, batch_id))
                    found = gaps()
                    if with_batch:
                        done = asyncio.run(_completed(local.url, batch_id)) - before
                        rate = done * output_len / (time.perf_counter() - began)
                        asyncio.run(_cancel(local.url, batch_id))
                    if number:
                        (beside if with_batch else alone).append(found)
                        rates += [rate] if with_batch else []
    report: dict[str, Any] = {"batch_tokens_per_s": statistics.median(rates)}
    for name in ("median", "p99"):
        ratios = [b[name] / a[name] for a, b in zip(alone, beside, strict=True)]
        report[name] = {
            "alone_ms": statistics.median(a[name] for a in alone),
            "beside_ms": statistics.median(b[name] for b in beside),
            "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        }
    return report


def _lines(model: str, vocab: int, input_len: int, output_len: int) -> bytes:
    rng = random.Random(0)
    body = {"model": model, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions"}
    return b"".join(
        json.dumps(
            {"custom_id": str(i), **line, "body": {**body, "prompt": rng.choices(range(vocab), k=input_len)}}
        ).encode()
        + b"\n"
        for i in range(LINES)
    )


async def _start(url: str, lines: bytes) -> str:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", lines, filename="in.jsonl")
    async with aiohttp.ClientSession(url) as session:
        file = await _json(session.post("/v1/files", data=form))
        wanted = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = await _json(session.post("/v1/batches", json=wanted))
        while batch["status"] == "validating":
            await asyncio.sleep(0.1)
            batch = await _json(session.get(f"/v1/batches/{batch['id']}"))
        await asyncio.sleep(WARM)
    return str(batch["id"])


async def _completed(url: str, batch_id: str) -> int:
    async with aiohttp.ClientSession(url) as session:
        return int((await _json(session.get(f"/v1/batches/{batch_id}")))["request_counts"]["completed"])


async def _cancel(url: str, batch_id: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        await _json(session.post(f"/v1/batches/{batch_id}/cancel"))
        while (await _json(session.get(f"/v1/batches/{batch_id}")))["status"] == "cancelling":
            await asyncio.sleep(0.1)


async def _json(request: Any) -> Any:
    async with request as response:
        found = await response.json()
        if response.status != 200:
            raise ValueError(f"a request failed: {found}")
        return found
