"""Many clients at once, of which half vanish, and readers that do not keep up: nothing of theirs stays behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lpa_model.config import Architecture
from server.engine.async_engine import Mailbox
from server.engine.request import FinishReason, Logprobs, RequestOutput
from tests.serving import Served, serving, slow_steps, until
from tests.soak.broken import COMPLETIONS, post

CLIENTS = 200
BODY = b"x" * 1000  # announced, and not sent


def server_tasks(served: Served) -> set[str]:
    """Names of the coroutines that run on the server's event loop."""
    loop = served.server.engine._loop
    assert loop is not None

    async def names() -> set[str]:
        await asyncio.sleep(0)
        mine = asyncio.current_task()
        return {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() if task is not mine}

    return asyncio.run_coroutine_threadsafe(names(), loop).result(600)


async def client(served: Served, number: int, leaves: bool) -> bytes:
    """Everything the server sent; a client that leaves closes its socket after a while and reads no further."""
    rng = random.Random(number)
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": [rng.randrange(1, 300) for _ in range(rng.randrange(1, 60))],
        "max_tokens": rng.randrange(10, 40),
        "ignore_eos": True,
        "n": rng.choice([1, 1, 2]),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice([0, 1]),
    }
    if rng.random() < 0.2:
        body |= {"echo": True, "logprobs": 1}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
    try:
        writer.write(post(COMPLETIONS, data))
        if leaves:
            await asyncio.sleep(rng.random() * 1.5)
            return b""
        return await asyncio.wait_for(reader.read(), 600)
    finally:
        writer.transport.abort()


async def test_two_hundred_clients_of_which_half_vanish(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_num_seqs=16, kv_cache_memory=1 << 19) as served:
        before = server_tasks(served)
        answers = await asyncio.gather(*(client(served, i, leaves=i % 2 == 1) for i in range(CLIENTS)))
        for answer in answers[::2]:
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
            assert b'"finish_reason":"length"' in answer
        assert not any(answers[1::2])
        await asyncio.to_thread(until, served.idle)
        await asyncio.to_thread(until, lambda: not served.server.engine._mailboxes)
        await asyncio.to_thread(until, lambda: server_tasks(served) <= before)
        assert served.engine.scheduler.blocks.num_held == 0
        assert served.complete(prompt="still here", max_tokens=3)["choices"]


def test_a_reader_that_does_not_keep_up_is_waited_for(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets everything; meanwhile the server holds one merged output per sequence and what fills the sockets."""
    with serving(tiny_checkpoints["setting2"]) as served:
        slow_steps(served, monkeypatch, 0.001)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True, "logprobs": 20}
        data = json.dumps({**body, "n": 8}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", served.server.port))
            slow.settimeout(20)
            slow.sendall(post(COMPLETIONS, data))
            most = 0
            for _ in range(50):
                time.sleep(0.02)
                mailboxes = set(served.server.engine._mailboxes.values())
                most = max([most, *(len(mailbox) for mailbox in mailboxes)])
            assert most <= 8
            received = b""
            while piece := slow.recv(1 << 16):
                received += piece
        text = received.decode()
        assert text.count('"finish_reason":"length"') == 8
        assert "data: [DONE]" in text
        until(served.idle)


async def test_waiting_outputs_of_a_sequence_become_one() -> None:
    mailbox = Mailbox()
    for i in range(1000):
        scores = Logprobs([-1.0 - i], [1], [[i]], [[-1.0 - i]])
        mailbox.put(RequestOutput(request_id="a", text=f"{i} ", token_ids=[i], logprobs=scores))
        mailbox.put(RequestOutput(request_id="b", token_ids=[i]))
    mailbox.put(RequestOutput(request_id="a", text="end", finish_reason=FinishReason.STOP, stop_reason="x"))
    assert len(mailbox) == 2
    output = await mailbox.take()
    assert output.request_id == "a"
    assert output.token_ids == list(range(1000))
    assert output.text == "".join(f"{i} " for i in range(1000)) + "end"
    assert output.logprobs is not None
    assert output.logprobs.top_ids == [[i] for i in range(1000)]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "x")
    assert (await mailbox.take()).token_ids == list(range(1000))
    assert len(mailbox) == 0


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_wrong_request(
    tiny_checkpoints: dict[Architecture, Path],
) -> None:
    labels = 'handler="/v1/completions",method="POST",model_name="tiny",status="499"'
    with serving(tiny_checkpoints["setting2"]) as served:
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=600) as client:
            client.sendall(post(COMPLETIONS, BODY, "Expect: 100-continue").removesuffix(BODY))
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            client.sendall(b'{"prompt": ')
        until(lambda: f"lpa:http_requests_total{{{labels}}} 1.0" in served.client.get("/metrics").text)


def test_a_request_that_is_cancelled_before_its_body_has_come_is_told_so(
    tiny_checkpoints: dict[Architecture, Path],
) -> None:
    with serving(tiny_checkpoints["setting2"], admin_api_key="boss") as served:
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=600) as client:
            client.sendall(post(COMPLETIONS, BODY, "x-request-id: a", "Expect: 100-continue").removesuffix(BODY))
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            answer = served.client.post("/v1/requests/a/cancel", headers={"authorization": "Bearer boss"})
            assert answer.json()["cancelled"] == 1
            refused = b"".join(iter(lambda: client.recv(1 << 12), b""))
        assert refused.startswith(b"HTTP/1.1 499 ") and b'"code": "request_cancelled"' in refused


def test_the_tasks_of_requests_are_counted(
    tiny_checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = 'lpa:event_loop_tasks{model_name="tiny"}'
    with serving(tiny_checkpoints["setting2"]) as served:
        before = served.metric(name)
        slow_steps(served, monkeypatch, 0.01)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True}
        with served.client.stream("POST", "/v1/completions", json=body), httpx.Client(base_url=served.url) as other:
            page = other.get("/metrics").text
            assert float(page.partition(f"{name} ")[2].partition("\n")[0]) > before
        until(lambda: served.metric(name) <= before)
