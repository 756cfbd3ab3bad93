"""The largest requests that a server's limits allow, one of each kind, and some that are beyond them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.settings import Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PERPLEXITY, LOGLIKELIHOOD = "/v1/perplexity", "/v1/loglikelihood"
JSON, LINES = "application/json", "application/x-ndjson"
WORD = "abcdefgh" * 6


@dataclass(frozen=True)
class Kind:
    """A request; without a body it is a GET. `raw` is sent as it is, instead of a path and a body."""

    name: str
    path: str = "/"
    body: bytes = b""
    media: str = JSON
    raw: bytes | None = None


def largest_requests(model: str, settings: Settings) -> Iterator[Kind]:
    """Every kind; each is made when it is taken."""
    yield Kind("nothing else", "/version")
    yield from _texts(model, settings)
    yield from _counts(model, settings)
    yield from _conversations(model, settings)
    yield from _scoring(model, settings)
    for name, form in GRAMMARS.items():
        yield _post(f"grammar: {name}", COMPLETIONS, model, prompt="a", max_tokens=64, structured_outputs=form)
    yield Kind("a 32 MB header", raw=b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (32 << 20))
    fields = b"".join(b"x-%d: y\r\n" % i for i in range(1200))
    yield Kind("1,200 headers", raw=b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + fields + b"\r\n")


def _post(name: str, path: str, model: str, **fields: Any) -> Kind:
    return Kind(name, path, json.dumps({"model": model, **fields}).encode())


def _text(length: int) -> str:
    return ("the sea, a ship and {a: [1, 2]} " * (length // 32 + 1))[:length]


def _texts(model: str, settings: Settings) -> Iterator[Kind]:
    max_chars = settings.max_body_bytes - 1000
    yield _post("a long prompt", COMPLETIONS, model, prompt=_text(max_chars), max_tokens=1)
    yield _post("a prompt of line breaks", COMPLETIONS, model, prompt="\n" * (max_chars // 2), max_tokens=1)
    yield _post("/tokenize", "/tokenize", model, prompt=_text(max_chars))
    yield _post("/tokenize with strings", "/tokenize", model, prompt=_text(max_chars), return_token_strs=True)
    yield _post("/detokenize", "/detokenize", model, tokens=[1] * (settings.max_body_values - 100))


def _counts(model: str, settings: Settings) -> Iterator[Kind]:
    values, most, entries = settings.max_body_values - 100, settings.max_sequences, settings.max_list_entries
    n = min(128, most)

    def completion(name: str, **fields: Any) -> Kind:
        return _post(name, COMPLETIONS, model, **{"prompt": "a", "max_tokens": 1, **fields})

    yield completion("a prompt of ids", prompt=[1] * values)
    yield completion("ids beyond the limit", prompt=[1] * (settings.max_body_bytes // 4))
    yield completion("prompts", prompt=["a"] * most)
    yield completion("prompts of ids", prompt=[[1]] * most)
    yield completion("prompts x n", prompt=["a"] * (most // n), n=n)
    yield completion("prompts beyond the limit", prompt=["a"] * values)
    word = WORD[: settings.max_bad_words_bytes // entries - 8]
    yield completion("bad_words", bad_words=[f"{i} {word}" for i in range(entries)])
    yield completion("bad_words beyond the limit", bad_words=[WORD] * (settings.max_body_bytes // 64))
    yield completion("a long bad word", bad_words=[_text(settings.max_body_bytes - 1000)])
    yield completion("a stop text", stop="a" * settings.max_stop_bytes, max_tokens=50)
    yield completion("logit_bias", logit_bias={str(i): 1 for i in range(entries)})
    yield completion("logit_bias beyond the limit", logit_bias={str(i): 1 for i in range(values // 9)})
    yield completion("wrong stop_token_ids", stop_token_ids=["a"] * values)
    yield completion("unknown fields", **{f"unknown {i}": 1 for i in range(values // 9)})
    twice = b", ".join(b'"%d": 1' % (i % (values // 9 - 1)) for i in range(values // 9))
    yield Kind("names, one twice", COMPLETIONS, b'{"model": "x", "logit_bias": {%b}}' % twice)
    yield completion("objects", metadata=[{}] * (values // 5))
    yield completion("lists", metadata=[[]] * (values // 5))


def _conversations(model: str, settings: Settings) -> Iterator[Kind]:
    message, part = {"role": "user", "content": "a"}, {"type": "text", "text": "a"}
    most, values = settings.max_messages, settings.max_body_values
    yield _post("messages", CHAT, model, messages=[message] * most)
    yield _post("messages beyond the limit", CHAT, model, messages=[message] * (values // 22))
    yield _post("parts of a message", CHAT, model, messages=[{"role": "user", "content": [part] * most}])
    text = _text(settings.max_body_bytes - 1000)
    yield _post("a long message", CHAT, model, messages=[{"role": "user", "content": text}])


def _scoring(model: str, settings: Settings) -> Iterator[Kind]:
    max_chars = settings.max_body_bytes - 1000
    yield _post("a text's perplexity", PERPLEXITY, model, input=_text(max_chars // 16), method="chunks")
    yield _post("texts' perplexities", PERPLEXITY, model, input=["a b"] * 4096)
    rows = {"method": "sliding", "return_tokens": True, "top_logprobs": 20}
    yield _post("tokens' log-probabilities", PERPLEXITY, model, input=_text(max_chars // 64), **rows)
    line = json.dumps(_text(max_chars)).encode()
    yield Kind("a line of a corpus", f"{PERPLEXITY}?model={model}&method=full", line + b"\n", LINES)
    yield _post("pairs of texts", LOGLIKELIHOOD, model, pairs=[["a", " b"]] * 4096)


GRAMMARS: dict[str, dict[str, Any]] = {
    "5,000 properties": {
        "json": {"type": "object", "properties": {f"property {i}": {"type": "string"} for i in range(5000)}}
    },
    "a crash of the compiler": {"json": {"const": -9223372036854775807}},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" | "b" |'},
    "crossed expressions": {"grammar": "start: A\nA: /(a|b)*a(a|b){30}/ & /(a|b)*b(a|b){37}/ & /(a|b)*a(a|b){43}/"},
    "a large expression": {"regex": r"(\w{1,100}\p{L}*){1,100}"},
    "8,000 choices": {"choice": [f"choice {i}" for i in range(8000)]},
}
"""Forms of generated text that are hard to compile or to follow."""
