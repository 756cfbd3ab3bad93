"""The kinds of clients: each does one thing, and checks what it gets."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp

from tests.soak.broken import BROKEN, COMPLETIONS, Broken, post
from tests.soak.driver import LEFT, Driver, Fault, Kind, QueueFull, ServerEnded
from tests.soak.machine import ADMIN_KEY, QUEUE, SLOTS

CHAT, PERPLEXITY, LOGLIKELIHOOD = "/v1/chat/completions", "/v1/perplexity", "/v1/loglikelihood"
LINES = "application/x-ndjson"
WORDS = re.findall(
    r"\w+",
    "the a old young man woman king ship sea house road wind night day and but then when where he she it was had saw "
    "went came took gave said long cold dark bright never always over under into out of for with his her",
)
LARGE_TEXTS = 16  # different ones that are scored
LONGEST_TEXT = 3000  # words
BURST = 4 * (SLOTS + QUEUE)  # requests at once
STREAMED_LINES = "lines of scores: from one to the next"
ADMISSION = "lines of scores: to the first"


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(least, most)))


def large_text(number: int) -> str:
    """One of the texts that are scored again and again."""
    return words(random.Random(f"large text {number}"), LONGEST_TEXT // 3, LONGEST_TEXT)


def completion(rng: random.Random, least: int, most: int, **fields: Any) -> dict[str, Any]:
    """A completion of a known length."""
    length = rng.randrange(least, most)
    return {"prompt": words(rng, 2, 120), "max_tokens": length, "ignore_eos": True, **fields}


def check_lengths(answer: dict[str, Any], choices: int, length: int) -> None:
    found = [choice["finish_reason"] for choice in answer["choices"]]
    if found != ["length"] * choices or answer["usage"]["completion_tokens"] != choices * length:
        raise Fault(f"{choices} x {length} tokens were to come: {found}, {answer['usage']}")


# --- text ----------------------------------------------------------------------------------------------------------


async def stream(driver: Driver, rng: random.Random) -> str:
    """A stream that is read to its end."""
    body = completion(rng, 20, 200, temperature=rng.choice([0, 1]), stream_options={"include_usage": True})
    text, usage, reason = "", dict[str, Any](), None
    async with aclosing(driver.events(COMPLETIONS, body)) as chunks:
        async for chunk in chunks:
            if "error" in chunk:
                raise Fault(f"a stream ends with {chunk}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    if reason != "length" or usage.get("completion_tokens") != body["max_tokens"] or not text:
        raise Fault(f"a stream of {body['max_tokens']} tokens ended with {reason!r} and {usage}")
    return "ok"


async def chat(driver: Driver, rng: random.Random) -> str:
    """A conversation, whole or streamed; what is generated greedily is the same again."""
    messages = [{"role": "user", "content": f"Question {rng.randrange(20)}: where is the ship?"}]
    body = {"messages": messages, "max_tokens": 40, "temperature": 0}
    if rng.random() < 0.5:
        answer = await driver.post(CHAT, body)
        text = answer["choices"][0]["message"]["content"]
    else:
        text = ""
        async with aclosing(driver.events(CHAT, {**body, "stream_options": {"include_usage": True}})) as chunks:
            async for chunk in chunks:
                if "error" in chunk:
                    raise Fault(f"a chat ends with {chunk}")
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    driver.same(messages[0]["content"], text)
    return "ok"


async def several(driver: Driver, rng: random.Random) -> str:
    """Four completions of a prompt, long enough to fill the cache."""
    body = completion(rng, 100, 250, n=4, temperature=1)
    check_lengths(await driver.post(COMPLETIONS, body), 4, body["max_tokens"])
    return "ok"


async def sampled(driver: Driver, rng: random.Random) -> str:
    """A seeded completion with its log-probabilities, to be compared with its solo run."""
    body = completion(rng, 8, 60, temperature=1, seed=rng.randrange(1 << 40), logprobs=2)
    answer = await driver.post(COMPLETIONS, body)
    check_lengths(answer, 1, body["max_tokens"])
    driver.sampled.append((body, generated(answer)))
    return "ok"


def generated(answer: dict[str, Any]) -> Any:
    """Text and log-probabilities."""
    (choice,) = answer["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


# --- forms ---------------------------------------------------------------------------------------------------------


async def schema(driver: Driver, rng: random.Random) -> str:
    """An object of a schema, of which every third is a new one, or an expression."""
    names = [f"field_{rng.randrange(10_000)}"] if rng.random() < 0.3 else ["mood", "calm"]
    if rng.random() < 0.3:
        answer = await driver.post(
            COMPLETIONS, {"prompt": "born in", "max_tokens": 12, "structured_outputs": {"regex": " 1[0-9]{3}\\."}}
        )
        text = answer["choices"][0]["text"]
        if not re.fullmatch(r" 1[0-9]{3}\.", text):
            raise Fault(f"not of the expression: {text!r}")
        return "ok"
    properties = {name: {"enum": ["calm", "stormy"]} for name in names}
    form = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    answer = await driver.post(
        CHAT,
        {
            "messages": [{"role": "user", "content": "How is the sea?"}],
            "max_tokens": 120,
            "temperature": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": form, "strict": True}},
        },
    )
    choice = answer["choices"][0]
    if choice["finish_reason"] == "stop" and sorted(json.loads(choice["message"]["content"])) != sorted(names):
        raise Fault(f"not of the schema: {choice}")
    return "ok" if choice["finish_reason"] == "stop" else "ok, cut off"


async def tools(driver: Driver, rng: random.Random) -> str:
    """A call of a function."""
    parameters = {"type": "object", "properties": {"mood": {"enum": ["calm", "stormy"]}}, "required": ["mood"]}
    answer = await driver.post(
        CHAT,
        {
            "messages": [{"role": "user", "content": words(rng, 3, 30)}],
            "max_tokens": 120,
            "temperature": 1,
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": {"name": "report", "parameters": parameters}}],
            "tool_choice": "required",
        },
    )
    choice = answer["choices"][0]
    if choice["finish_reason"] == "length":
        return "ok, cut off"
    (call,) = choice["message"]["tool_calls"]
    if json.loads(call["function"]["arguments"])["mood"] not in ("calm", "stormy"):
        raise Fault(f"no call of the function: {choice}")
    return "ok"


# --- scores --------------------------------------------------------------------------------------------------------


async def lines(driver: Driver, rng: random.Random) -> str:
    """Large texts through one connection. Once the first is answered, the others are, however full the queue is."""
    numbers = [rng.randrange(LARGE_TEXTS) for _ in range(rng.randrange(3, 9))]
    path = f"{PERPLEXITY}?method=rolling&stream=true"

    async def body() -> AsyncIterator[bytes]:
        for number in numbers:
            yield json.dumps(large_text(number)).encode() + b"\n"
            await asyncio.sleep(0.01)

    found: list[dict[str, Any]] = []
    measure = stopwatch(driver)
    while not found:
        try:
            async with driver.answer("POST", path, data=body(), headers={"Content-Type": LINES}) as response:
                with driver.connection():
                    async for line in response.content:
                        measure(STREAMED_LINES if found else ADMISSION)
                        found.append(json.loads(line))
        except QueueFull:
            await asyncio.sleep(0.1)
    *texts, corpus = found
    if "error" in corpus or len(texts) != len(numbers):
        raise Fault(f"{len(texts)} of {len(numbers)} texts, then {corpus}")
    for number, text in zip(numbers, texts, strict=True):
        driver.same(("large text", number), (text["nll_sum"], text["num_tokens"]))
    return "ok"


def stopwatch(driver: Driver) -> Callable[[str], None]:
    """A function that notes the time since it was made or last called, and what the server computed in it."""
    clocks = (time.monotonic(), driver.server.processor_seconds())

    def measure(what: str) -> None:
        nonlocal clocks
        now = (time.monotonic(), driver.server.processor_seconds())
        driver.measured(what, now[0] - clocks[0])
        driver.measured(f"{what}, of processor time", now[1] - clocks[1])
        clocks = now

    return measure


async def loglikelihood(driver: Driver, rng: random.Random) -> str:
    """Sets of continuations, whose log-probabilities are the same again."""
    numbers = [rng.randrange(100) for _ in range(rng.randrange(1, 12))]
    contexts = [words(random.Random(f"context {i}"), 20, 200) for i in numbers]
    sets = [{"context": context, "continuations": [" ship", " the king", " was"]} for context in contexts]
    answer = await driver.post(LOGLIKELIHOOD, {"sets": sets})
    for number, found in zip(numbers, answer["data"], strict=True):
        driver.same(("context", number), [entry["logprob"] for entry in found["continuations"]])
    return "ok"


# --- batches -------------------------------------------------------------------------------------------------------


def batch_lines(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Lines of a batch's input."""
    bodies = [completion(rng, 8, 40, temperature=1, seed=rng.randrange(1 << 40), logprobs=2) for _ in range(count)]
    return [
        {"custom_id": f"line {i}", "method": "POST", "url": COMPLETIONS, "body": body} for i, body in enumerate(bodies)
    ]


async def start_batch(driver: Driver, requests: list[dict[str, Any]]) -> str:
    """Upload a file and start a batch over it; its id."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", "".join(json.dumps(line) + "\n" for line in requests).encode(), filename="in.jsonl")
    async with driver.answer("POST", "/v1/files", data=form) as response:
        file_id = (await response.json())["id"]
    started = await driver.post(
        "/v1/batches", {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    )
    batch_id: str = started["id"]
    return batch_id


async def finished_batch(driver: Driver, batch_id: str) -> dict[str, Any]:
    """Wait for a batch's end."""
    while True:
        found = await driver.get(f"/v1/batches/{batch_id}")
        if found["status"] in ("completed", "failed", "cancelled", "expired"):
            return found
        await asyncio.sleep(0.5)


async def check_batch(driver: Driver, found: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Every line has one answer, in order; they join the sampled texts."""
    if found["status"] != "completed" or found["error_file_id"] is not None:
        raise Fault(f"a batch is {found}")
    answers = await _output(driver, found)
    if [answer["custom_id"] for answer in answers] != [request["custom_id"] for request in requests]:
        raise Fault(f"a batch of {len(requests)} lines has answers to {[answer['custom_id'] for answer in answers]}")
    for request, answer in zip(requests, answers, strict=True):
        body = answer["response"]["body"]
        check_lengths(body, 1, request["body"]["max_tokens"])
        driver.sampled.append((request["body"], generated(body)))


async def _output(driver: Driver, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a batch's output file; its files are deleted."""
    answers = []
    if found["output_file_id"] is not None:
        async with driver.answer("GET", f"/v1/files/{found['output_file_id']}/content") as response:
            answers = [json.loads(line) for line in (await response.text()).splitlines()]
    for answer in answers:
        driver.add_usage(answer["response"]["body"])
    for name in ("input_file_id", "output_file_id"):
        if found[name] is not None:
            async with driver.answer("DELETE", f"/v1/files/{found[name]}"):
                pass
    return answers


async def batch(driver: Driver, rng: random.Random) -> str:
    """A batch, waited for or cancelled."""
    requests = batch_lines(rng, rng.randrange(4, 16))
    batch_id = await start_batch(driver, requests)
    if rng.random() < 0.25:
        await asyncio.sleep(rng.random())
        driver.leave_unread(sum(request["body"]["max_tokens"] for request in requests))
        async with driver.answer("POST", f"/v1/batches/{batch_id}/cancel", good=(200, 400)):
            pass  # 400: it was done
        await _output(driver, await finished_batch(driver, batch_id))
        return "cancelled"
    await check_batch(driver, await finished_batch(driver, batch_id), requests)
    return "ok"


# --- clients that do not behave --------------------------------------------------------------------------------------


async def leaves_stream(driver: Driver, rng: random.Random) -> str:
    """Reads a few chunks of a long stream and closes the connection."""
    body = completion(rng, 100, 300, n=rng.choice([1, 1, 3]), temperature=1)
    left = rng.randrange(1, 10)
    async with aclosing(driver.events(COMPLETIONS, body)) as chunks:
        driver.leave_unread(body["n"] * body["max_tokens"])
        async for _ in chunks:
            left -= 1
            if not left:
                break
    return LEFT


@asynccontextmanager
async def raw_connection(
    driver: Driver, receive_buffer: int = 0
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is torn down at the end of the context."""
    with driver.connection():
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", driver.server.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 14)
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def leaves_upload(driver: Driver, rng: random.Random) -> str:
    """Sends a part of a body that the server waits for, and closes the connection."""
    path, media, body = rng.choice(
        [
            (COMPLETIONS, "application/json", json.dumps({"prompt": words(rng, 5000, 6000)}).encode()),
            (
                f"{PERPLEXITY}?method=rolling&stream=true",
                LINES,
                b"\n".join(json.dumps(large_text(i)).encode() for i in range(4)),
            ),
            ("/v1/files", "multipart/form-data; boundary=x", _form(b"{}\n" * 100_000)),
        ]
    )
    request = post(path, body, "Expect: 100-continue", media=media)
    head = request[: len(request) - len(body)]
    async with raw_connection(driver) as (reader, writer):
        writer.write(head)
        told = await reader.readuntil(b"\r\n\r\n")
        if not told.startswith(b"HTTP/1.1 100 "):
            if b" 503 " in told.partition(b"\r\n")[0]:
                raise ServerEnded
            raise Fault(f"{path}: {told[:200]!r} before the body")
        driver.count("POST", path, LEFT)
        writer.write(body[: rng.randrange(len(body) // 4, len(body) - 1)])
        await asyncio.sleep(rng.random() * 0.5)
    return LEFT


def _form(content: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n"


async def slow_reader(driver: Driver, rng: random.Random) -> str:
    """Takes its time over a stream that fills the sockets; nothing of it is lost."""
    body = completion(rng, 100, 150, n=4, stream=True, logprobs=20, stream_options={"include_usage": True})
    received, sent = b"", time.monotonic()
    async with raw_connection(driver, receive_buffer=4096) as (reader, writer):
        writer.write(post(COMPLETIONS, json.dumps(body).encode()))
        while piece := await reader.read(1 << 13):
            received += piece
            await asyncio.sleep(0.02)
    head, _, rest = received.partition(b"\r\n\r\n")
    if not head:
        raise ServerEnded if driver.explains(sent) else Fault("a slow reader got no answer")
    status = int(head[9:12])
    driver.count("POST", COMPLETIONS, status)
    if status == 429:
        raise QueueFull
    if status == 503 and driver.is_ending:
        raise ServerEnded
    if rest.count(b'"finish_reason":"length"') != 4 or b"data: [DONE]" not in rest:
        raise ServerEnded if driver.is_killed else Fault(f"a slow reader got {head!r} and the end {rest[-300:]!r}")
    driver.generated += 4 * body["max_tokens"]
    return "ok"


async def malformed(driver: Driver, rng: random.Random) -> str:
    """What must be refused."""
    return await send_broken(driver, rng.choice(BROKEN))


async def send_broken(driver: Driver, broken: Broken) -> str:
    answer, sent = b"", time.monotonic()
    async with raw_connection(driver) as (reader, writer):
        writer.write(broken.content)
        while b"\r\n\r\n" not in answer and (piece := await reader.read(1 << 12)):
            answer += piece
    if not answer and driver.explains(sent):
        raise ServerEnded
    status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
    if broken.counted is not None and status:
        driver.count(broken.method, broken.counted, status)
    if status == broken.status:
        return "refused"
    if status == 503 and driver.is_ending:
        raise ServerEnded
    raise Fault(f"{broken.name}: {answer[:300]!r} instead of a {broken.status}")


async def cancel(driver: Driver, rng: random.Random) -> str:
    """A request that an operator cancels, streamed or not."""
    name = f"cancel-{rng.randrange(1 << 40)}"
    body = completion(rng, 200, 400, temperature=1, n=2)
    driver.leave_unread(2 * body["max_tokens"])

    async def ask() -> str:
        headers = {"x-request-id": name}
        if rng.random() < 0.5:
            async with driver.answer("POST", COMPLETIONS, body, headers=headers, good=(200, 499)) as response:
                return "cancelled" if response.status == 499 else "was done"
        async with aclosing(driver.events(COMPLETIONS, body, headers, good=(200, 499))) as chunks:
            async for chunk in chunks:
                if "error" in chunk:
                    if chunk["error"]["code"] != "request_cancelled":
                        raise Fault(f"a cancelled stream ends with {chunk}")
                    return "cancelled"
        return "was done"

    asking = asyncio.create_task(ask())
    try:
        await asyncio.sleep(rng.random())
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with driver.answer("POST", f"/v1/requests/{name}/cancel", headers=headers, good=(200, 404)):
            pass
        return await asking
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def burst(driver: Driver, rng: random.Random) -> str:
    """Far more requests at once than slots and queue hold; each one is answered, or refused with a 429."""
    bodies = [completion(rng, 4, 24, temperature=1, seed=rng.randrange(1 << 40), logprobs=2) for _ in range(BURST)]

    async def ask(body: dict[str, Any]) -> int:
        try:
            answer = await driver.post(COMPLETIONS, body)
        except QueueFull:
            return 1
        check_lengths(answer, 1, body["max_tokens"])
        driver.sampled.append((body, generated(answer)))
        return 0

    found = await _all(ask, bodies)
    return "over the queue" if any(found) else "ok"


async def _all(ask: Callable[[Any], Awaitable[int]], bodies: list[Any]) -> list[int]:
    """All at once; the first error is raised when all are done."""
    found = await asyncio.gather(*map(ask, bodies), return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return [value for value in found if isinstance(value, int)]


async def probe(driver: Driver, rng: random.Random) -> str:
    """What an orchestrator asks."""
    began = time.monotonic()
    async with driver.answer("GET", "/health"):
        driver.measured("/health", time.monotonic() - began)
    return "ok"


KINDS = [
    Kind("stream", stream, clients=4),
    Kind("chat", chat, clients=2),
    Kind("several", several),
    Kind("sampled", sampled, clients=2),
    Kind("schema", schema, clients=2),
    Kind("tools", tools),
    Kind("lines", lines, pause=1),
    Kind("loglikelihood", loglikelihood),
    Kind("batch", batch, pause=1, limit=3600),  # it may wait for as long as there is other load
    Kind("leaves stream", leaves_stream, clients=2),
    Kind("leaves upload", leaves_upload, pause=0.5),
    Kind("slow reader", slow_reader, pause=1),
    Kind("malformed", malformed, clients=2),
    Kind("cancel", cancel),
    Kind("burst", burst, pause=8),
    Kind("probe", probe, pause=0.2),
]
