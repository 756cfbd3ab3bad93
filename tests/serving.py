"""A real server for tests: an engine over a model folder, uvicorn in a thread, a client on a socket."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.serve import Server
from server.settings import load_settings


class Served:
    """A server in a thread of its own, and a client for it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.engine = server.engine._engine
        self.url = f"http://127.0.0.1:{server.port}"
        self.client = httpx.Client(base_url=self.url, timeout=600, verify=False)  # reads no certificates

    def post(self, path: str, **body: Any) -> httpx.Response:
        content = json.dumps({"model": "tiny", **body})  # ASCII, so that it can hold half a surrogate pair
        return self.client.post(path, content=content, headers={"content-type": "application/json"})

    def answer(self, path: str, **body: Any) -> dict[str, Any]:
        """The JSON of an answer that is no error."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def complete(self, **body: Any) -> dict[str, Any]:
        return self.answer("/v1/completions", **body)

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ended as it should."""
        response = self.post("/v1/completions", stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def idle(self) -> bool:
        blocks = self.engine.scheduler.blocks
        return not self.engine.has_work and blocks.num_free + blocks.num_cached == blocks.num_blocks

    def loop_thread(self) -> threading.Thread:
        """The thread of the event loop."""
        current: Future[threading.Thread] = Future()
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(lambda: current.set_result(threading.current_thread()))
        return current.result(600)

    def metric(self, sample: str) -> float:
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found is not None, sample
        return float(found[1])


@contextmanager
def serving(folder: Path, **flags: Any) -> Iterator[Served]:
    """A server of the name "tiny" on a free port; `flags` are settings."""
    defaults = {"dtype": "float32", "threads": 1, "block_size": 32, "kv_cache_memory": 1 << 22, "port": 0}
    server = Server(load_settings(**{**defaults, "model": folder, "served_model_name": "tiny", **flags}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        served = Served(server)
        with served.client:
            yield served
    finally:
        server.should_exit = True
        thread.join(600)
    assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, ten minutes at most, which end what hangs."""
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in ten minutes"
        time.sleep(0.01)


def slow_steps(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make every step take `seconds` longer."""
    run = served.engine.runner.run

    def slowly(batch: Any) -> Any:
        time.sleep(seconds)
        return run(batch)

    monkeypatch.setattr(served.engine.runner, "run", slowly)


def fail_step(served: Served, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the step of this number fail, counted from 1, from now on."""
    run, steps = served.engine.runner.run, itertools.count(1)

    def fail(batch: Any) -> Any:
        if next(steps) == number:
            raise RuntimeError("no")
        return run(batch)

    monkeypatch.setattr(served.engine.runner, "run", fail)
