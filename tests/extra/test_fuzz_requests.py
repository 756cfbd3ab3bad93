"""Thousands of requests as strangers may send them, against every native part that reads them: tokenizer, JSON, HTTP
and the kernels. Each is answered or refused, none is the server's fault, and the server lives on."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from tests.serving import Served, serving, until

EXAMPLES = 1500
COMPLETIONS = "/v1/completions"
PIECES = [
    *"aZ9 \n\t\r\0é\u0301\u200d\u2028\ufeff\ufffd\U0001f469\U0010ffff",
    *("<|endoftext|>", "<|endoftext", "\ud800", "\udc00", "\ud83d\ude00", "  ", "'s", "\u0600\u06dd", "ﷺ", "\x7f\x80"),
]
EDGES = [0, -0.0, 1, -1, 2, 1e-300, 5e-324, 1e-7, 1e300, -1e300, 2**31, 2**53, 2**63 - 1, -(2**63), 2**63, 0.999999999]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"], header_timeout=1, body_timeout=1) as server:
        yield server
        until(server.idle)
        assert server.client.get("/health").status_code == 200
        assert server.complete(prompt="a", max_tokens=3)["usage"]["completion_tokens"]


def test_any_text_is_tokenized_and_comes_back(served: Served) -> None:
    rng = random.Random(1)
    statuses = set()
    for _ in range(EXAMPLES):
        text = "".join(rng.choice(PIECES) * rng.choice((1, 1, 1, 2, 50)) for _ in range(rng.randrange(12)))
        if rng.random() < 0.02:
            text = (text or "x") * (20_000 // max(1, len(text)))
        answer = served.post("/tokenize", prompt=text)
        statuses.add(answer.status_code)
        text = json.loads(json.dumps(text))  # two halves of a pair side by side are a character
        is_text = not any("\ud800" <= character <= "\udfff" for character in text)
        assert answer.status_code == (200 if is_text else 400), (text, answer.text)
        if is_text:
            assert served.post("/detokenize", tokens=answer.json()["tokens"]).json() == {"prompt": text}
    assert statuses == {200, 400}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them changed, left out, doubled or exchanged for what parsers stumble over."""
    odd = [
        b"\0",
        b'"',
        b"\\",
        b"{",
        b"[" * 200,
        b"]",
        b"\xff",
        b"1e999",
        b"-0",
        b"NaN",
        b"\r\n",
        b":",
        b" " * 300,
        b"9" * 400,
    ]
    for _ in range(rng.randrange(1, 5)):
        at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        piece = rng.choice([*odd, content[at:to], content[at:to] * 3, rng.randbytes(3)])
        content = content[:at] + piece + content[to if rng.random() < 0.3 else at :]
    return content


def test_any_body_is_read_or_refused(served: Served) -> None:
    rng = random.Random(2)
    body = {
        "model": "tiny",
        "prompt": ["a\u00e9\ud83d\ude00", "b"],
        "max_tokens": 2,
        "logit_bias": {"5": -1.5e1, "6": 100},
        "stop": ["\n", "x"],
        "temperature": 0.5,
        "structured_outputs": {"choice": ["a", "b"]},
    }
    statuses = set()
    for _ in range(EXAMPLES):
        content = mutated(json.dumps(body).encode(), rng)
        answer = served.client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), (content, answer.text)
        statuses.add(answer.status_code)
    assert {200, 400} <= statuses


def test_any_bytes_on_a_connection_are_answered_or_refused(served: Served) -> None:
    rng = random.Random(3)
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    plain = head + b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
    chunked = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    upgrade = (
        b"GET /health HTTP/1.0\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nExpect: 100-continue\r\n\r\n"
    )
    statuses = set()
    for _ in range(EXAMPLES):
        content = mutated(rng.choice((plain, chunked, upgrade)), rng)
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=30) as connection:
            answer = b""
            try:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(1 << 16):
                    answer += piece
            except ConnectionError:  # refused before it was all sent
                pass
        status = answer[9:12].decode()
        assert not answer or (answer.startswith(b"HTTP/1.1 ") and status < "500") or status == "505", (content, answer)
        statuses.add(status)
    assert {"200", "400"} <= statuses


def test_any_sampling_parameters_are_honoured_or_refused(served: Served) -> None:
    rng = random.Random(4)
    vocabulary = served.engine.tokenizer.vocab_size

    def number() -> Any:
        return rng.choice(EDGES if rng.random() < 0.5 else (0, 1, 2, 0.5))

    def tokens() -> list[int]:
        return [rng.choice((0, 1, vocabulary - 1, rng.randrange(vocabulary))) for _ in range(rng.randrange(4))]

    fields: dict[str, Any] = {
        **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "n", "logprobs", "min_tokens"), number),
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty", "prompt_logprobs"), number),
        **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), tokens),
        "logit_bias": lambda: {str(token): rng.choice((-100, 100, 0, 1e-300)) for token in tokens()},
        "bad_words": lambda: [rng.choice(("a", " ", "é", "\n")) for _ in range(rng.randrange(3))],
        "prompt": lambda: rng.choice(("a", "", tokens(), [tokens(), [5]], ["a", "b"], "x" * 60)),
        "ignore_eos": lambda: rng.random() < 0.5,
        "echo": lambda: rng.random() < 0.5,
        "truncate_prompt_tokens": number,
        "best_of": number,
    }
    statuses = []
    for _ in range(EXAMPLES):
        chosen = rng.sample(sorted(fields), rng.choice((1, 1, 2, 3, 8)))
        body = {"prompt": "a", **{name: fields[name]() for name in chosen}, "max_tokens": rng.choice((0, 1, 4))}
        answer = served.post(COMPLETIONS, **body)
        assert answer.status_code in (200, 400), (body, answer.text)
        statuses.append(answer.status_code)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"], (body, answer.text)
    assert EXAMPLES // 10 < statuses.count(200) < EXAMPLES
