"""Runs clients side by side and counts: what they sent, what came of it, and what the server must have counted."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from tests.soak.machine import ServerProcess

LEFT = "left"  # in the place of a status: the client has closed the connection
IDS = re.compile(r"/(file|batch|requests)(-|_|/)[^/]+")
TEMPLATES = {"file": "/{file_id}", "batch": "/{batch_id}", "requests": "/requests/{request_id}"}
RETRY = 0.2  # seconds after a 429

Handler = tuple[str, str, str]
"""Route, method, and status."""


class Fault(Exception):
    """What a server must not do."""


class QueueFull(Exception):
    """A 429."""


class ServerEnded(Exception):
    """The driver has had the server end, which explains an answer or the lack of one."""


@dataclass(frozen=True)
class Kind:
    """A kind of client. `run` does one thing and returns how it ended; it raises Fault, QueueFull or ServerEnded."""

    name: str
    run: Callable[[Driver, random.Random], Coroutine[Any, Any, str]]
    clients: int = 1
    pause: float = 0.2  # seconds between one thing and the next, at most
    limit: float = 600.0  # seconds in which a thing must be done, on the slowest of machines


@dataclass
class Tally:
    """What one kind of client did."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0  # seconds


class Driver:
    """Clients of one server."""

    def __init__(self, server: ServerProcess, kinds: list[Kind], seed: int) -> None:
        self.server = server
        self.seed = seed
        self.kinds = kinds
        self.tallies = {kind.name: Tally() for kind in kinds}
        self.faults: list[str] = []
        self.hung: list[str] = []
        self.longest: dict[str, float] = {}  # seconds, of what clients measure themselves
        self.sampled: list[tuple[dict[str, Any], Any]] = []  # bodies, and what was generated
        self.memory: list[tuple[float, int]] = []  # of the server: seconds since the start, bytes
        self._numbers: Counter[str] = Counter()  # things done, by client
        self._values: dict[Any, Any] = {}
        self._stopping = False
        self._up = asyncio.Event()
        self._ending: Literal["drain", "kill"] | None = None
        self._ending_since = 0.0
        self._session: aiohttp.ClientSession | None = None
        self.reset_counts()

    # --- the server's lives ----------------------------------------------------------------------------------------

    def reset_counts(self) -> None:
        """A process has started: its counters begin at 0."""
        self.answers: Counter[Handler] = Counter()
        self.generated = 0  # tokens that answers had
        self.generated_at_most = 0  # and those that clients did not wait for

    def server_is_up(self) -> None:
        self._ending = None
        self._up.set()

    def server_ends(self, how: Literal["drain", "kill"]) -> None:
        """To be called before the signal."""
        self._up.clear()
        self._ending, self._ending_since = how, time.monotonic()

    # --- running clients -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """All clients, for as long as the context; at its end each finishes what it does."""
        self._stopping = False
        async with self.requests():
            clients = [asyncio.create_task(self._client(kind, i)) for kind in self.kinds for i in range(kind.clients)]
            try:
                yield
                self._stopping = True
                await asyncio.gather(*clients)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    @asynccontextmanager
    async def requests(self) -> AsyncIterator[None]:
        """Requests can be sent in this context; at its end their connections are closed."""
        self._session = aiohttp.ClientSession(
            self.server.url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        try:
            yield
        finally:
            await self._session.close()
            self._session = None
            await asyncio.sleep(0.1)  # connections close in the loop's next iterations

    async def _client(self, kind: Kind, number: int) -> None:
        name = f"{kind.name} {number}"
        await asyncio.sleep(random.Random(f"{self.seed} {name}").random())  # they do not all begin at once
        while not self._stopping:
            await self._up.wait()
            label = f"{name}.{self._numbers[name]}"
            self._numbers[name] += 1
            rng = random.Random(f"{self.seed} {label}")
            outcome = await self.do(kind, label, rng)
            await asyncio.sleep(RETRY if outcome == "429" else rng.random() * kind.pause)

    async def do(self, kind: Kind, label: str, rng: random.Random) -> str:
        """One thing of a kind of client; how it ended. Faults are noted under the label."""
        began = time.monotonic()
        tally = self.tallies[kind.name]
        try:
            async with asyncio.timeout(kind.limit) as timer:
                outcome = await kind.run(self, rng)
        except QueueFull:
            outcome = "429"
        except ServerEnded:
            outcome = "server ended"
        except TimeoutError:
            outcome = "hung" if timer.expired() else "fault"
            (self.hung if timer.expired() else self.faults).append(f"{label}: after {kind.limit:g} s")
        except Exception as error:
            outcome = "fault"
            self.faults.append(f"{label}: {type(error).__name__}: {error}")
        tally.outcomes[outcome] += 1
        tally.longest = max(tally.longest, time.monotonic() - began)
        return outcome

    # --- what clients use ------------------------------------------------------------------------------------------

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Turns an error of a connection into ServerEnded where a signal explains it: a killed server answers nothing,
        one that drains nothing that was sent after the signal."""
        sent = time.monotonic()
        try:
            yield
        except (aiohttp.ClientError, OSError, EOFError) as error:
            if self.explains(sent):
                raise ServerEnded from error
            raise Fault(f"{type(error).__name__}: {error}") from error

    def explains(self, sent: float) -> bool:
        """Whether a signal explains that what was sent at a time has no answer."""
        return self._ending == "kill" or (self._ending == "drain" and sent >= self._ending_since)

    @property
    def is_ending(self) -> bool:
        return self._ending is not None

    @property
    def is_killed(self) -> bool:
        return self._ending == "kill"

    def count(self, method: str, path: str, status: int | str) -> None:
        """An HTTP request that has reached a route."""
        self.answers[route_of(path), method, str(status)] += 1

    @asynccontextmanager
    async def answer(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        data: Any = None,
        headers: dict[str, str] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to one request, whose status is one of `good`.

        Raises:
            QueueFull, ServerEnded, Fault
        """
        with self.connection():
            async with self.session.request(method, path, json=body, data=data, headers=headers) as response:
                self.count(method, path, response.status)
                if response.status not in good:
                    await self._refused(path, body, response)
                yield response

    async def _refused(self, path: str, body: Any, response: aiohttp.ClientResponse) -> None:
        text = await response.text()
        if response.status == 429:
            if "Retry-After" not in response.headers:
                raise Fault(f"{path}: a 429 without Retry-After")
            raise QueueFull
        if response.status == 503 and self._ending is not None:
            raise ServerEnded
        raise Fault(f"{path}: status {response.status}: {text[:500]}; body {json.dumps(body)[:1000]}")

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The JSON of an answer to a POST request; its generated tokens are counted."""
        async with self.answer("POST", path, body, **options) as response:
            found: dict[str, Any] = await response.json()
        self.add_usage(found)
        return found

    async def get(self, path: str) -> dict[str, Any]:
        async with self.answer("GET", path) as response:
            found: dict[str, Any] = await response.json()
        return found

    async def events(
        self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None, good: tuple[int, ...] = (200,)
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream, which ends as it should or with an error object; a Fault if it is cut off. An answer
        with another of the `good` statuses is its only chunk."""
        done = False
        async with self.answer("POST", path, {**body, "stream": True}, headers=headers, good=good) as response:
            if response.status != 200:
                yield await response.json()
                return
            with self.connection():
                async for line in response.content:
                    text = line.decode().strip()
                    if not text or text.startswith(":"):
                        continue
                    if done:
                        raise Fault(f"{path}: a stream goes on after its end: {text[:200]}")
                    if not text.startswith("data: "):
                        raise Fault(f"{path}: no event: {text[:200]}")
                    if text == "data: [DONE]":
                        done = True
                        continue
                    chunk = json.loads(text.removeprefix("data: "))
                    self.add_usage(chunk)
                    yield chunk
                    done = done or "error" in chunk
            if not done:
                raise ServerEnded if self._ending == "kill" else Fault(f"{path}: a stream without an end")

    def add_usage(self, answer: dict[str, Any]) -> None:
        usage = answer.get("usage") or {}
        self.generated += usage.get("completion_tokens", 0)

    def leave_unread(self, tokens: int) -> None:
        """So many tokens may be generated for a client that has left, or whose request has been cancelled."""
        self.generated_at_most += tokens

    def same(self, key: Any, value: Any) -> None:
        """Raises Fault unless a value is the one that earlier clients have had, to the bit."""
        if self._values.setdefault(key, value) != value:
            raise Fault(f"{key}: was {self._values[key]!r}, and is {value!r}")

    def measured(self, what: str, seconds: float) -> None:
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))


def route_of(path: str) -> str:
    """The template of a path, as the server counts it."""
    return IDS.sub(lambda found: TEMPLATES[found[1]], path.partition("?")[0])
