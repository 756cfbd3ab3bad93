"""Log-probabilities as OpenAI's completions show them: columns over a run of tokens."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from json.encoder import encode_basestring
from typing import Any

from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.protocol.json_text import WIDE, JsonText, listed

LOWEST_LOGPROB = -9999.0  # JSON has neither -inf nor NaN; OpenAI's number for "very unlikely"

Name = Callable[[int], str]
"""What a token is called by its id."""

Columns = dict[str, list[Any]]
"""{"tokens", "token_logprobs", "top_logprobs", "text_offset"}, each with one entry per token."""


def namer(tokenizer: Tokenizer, *, as_ids: bool) -> Name:
    """Tokens by their texts, or as token_id:N."""
    return "token_id:{}".format if as_ids else tokenizer.token_text


class TextOffsets:
    """Where tokens begin in the text that is decoded from them, in code points; feed it the tokens in order.

    A token that begins inside a character has that character's offset. With `skip_special`, special tokens have no
    text. `prefix` is the beginning of a character that the first token goes on with.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, skip_special: bool = True, prefix: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._position = start
        self._silent = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(prefix)

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        offsets = []
        for token_id in token_ids:
            raw = b"" if token_id in self._silent else self._tokenizer.token_bytes(token_id)
            begun = self._decoder.getstate()[0]
            head = self._decode(raw[:1])
            # a first byte that does not go on with the character that was begun stands behind its U+FFFD
            broken = begun and (len(head) > 1 or (len(head) == 1 and self._decoder.getstate()[0]))
            offsets.append(self._position + bool(broken))
            self._position += len(head) + len(self._decode(raw[1:]))
        return offsets

    def _decode(self, raw: bytes) -> str:
        text = self._decoder.decode(raw)
        begun = self._decoder.getstate()[0]
        if len(begun) == 2 and begun[0] == 0xED and begun[1] >= 0xA0:  # half a surrogate pair: no character begins so
            self._decoder.reset()
            text += "\ufffd\ufffd"
        return text


def offsets_of_ids(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """Where tokens begin in `tokenizer.decode(token_ids, skip_special_tokens=False)`, in code points."""
    first = next((raw for raw in map(tokenizer.token_bytes, token_ids) if raw), b"")
    spare = tokenizer.drops_first_space and first.startswith(b" ")
    offsets = TextOffsets(tokenizer, skip_special=False).take(token_ids)
    return [max(0, offset - 1) for offset in offsets] if spare else offsets


def prompt_columns(name: Name, token_ids: Sequence[int], offsets: list[int], scores: Logprobs, top: int) -> Columns:
    """The columns of a prompt; `scores` has an entry for each token but the first, which nothing predicts: null."""
    first: Columns = {
        "tokens": [name(token_ids[0])],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": offsets[:1],
    }
    return join([first, columns(name, token_ids[1:], scores, offsets[1:], top)])


def columns(name: Name, token_ids: Sequence[int], scores: Logprobs, offsets: list[int], top: int) -> Columns:
    """The columns of tokens that were scored; an entry of top_logprobs has the `top` best and the token itself."""
    logprobs = [_clamp(value) for value in scores.logprobs]
    return {
        "tokens": [name(token_id) for token_id in token_ids],
        "token_logprobs": logprobs,
        "top_logprobs": [
            _top(name, token_id, logprob, ids[:top], values[:top])
            for token_id, logprob, ids, values in zip(
                token_ids, logprobs, scores.top_ids, scores.top_logprobs, strict=True
            )
        ],
        "text_offset": offsets,
    }


def join(parts: Sequence[Columns]) -> Columns:
    """The columns of runs that follow one another."""
    return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}


def _top(
    name: Name, token_id: int, logprob: float, ids: Sequence[int], values: Sequence[float]
) -> dict[str, float] | JsonText:
    if len(ids) <= WIDE:
        return dict(_named(name, token_id, logprob, ids, values))

    def parts() -> Iterator[str]:
        pairs = _named(name, token_id, logprob, ids, values)
        return listed("{", (f"{encode_basestring(text)}:{value!r}" for text, value in pairs), "}")

    return JsonText(parts)


def _named(
    name: Name, token_id: int, logprob: float, ids: Sequence[int], values: Sequence[float]
) -> Iterator[tuple[str, float]]:
    """Best first; of two tokens with one text the better keeps it, and the other is called token_id:N."""
    texts: set[str] = set()
    for i, value in zip(ids, values, strict=True):
        text = name(i)
        if text in texts:
            text = f"token_id:{i}"
        texts.add(text)
        # the token's own number is the same float in both places: clients compare them to see if it was the best
        yield text, logprob if i == token_id else _clamp(value)
    if token_id not in ids:
        text = name(token_id)
        yield f"token_id:{token_id}" if text in texts else text, logprob


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: Logprobs, top: int
) -> list[dict[str, Any] | JsonText | None]:
    """vLLM's form: null for the first token, then for each the token itself and the `top` best, by token id."""

    def entry(place: tuple[int, float, int]) -> dict[str, Any]:
        i, value, rank = place
        return {"logprob": _clamp(value), "rank": rank, "decoded_token": tokenizer.token_text(i)}

    def text(place: tuple[int, float, int]) -> str:
        i, value, rank = place
        decoded = encode_basestring(tokenizer.token_text(i))
        return f'"{i}":{{"logprob":{_clamp(value)!r},"rank":{rank},"decoded_token":{decoded}}}'

    def parts(*row: Any) -> Iterator[str]:
        return listed("{", map(text, _ranked(*row)), "}")

    rows = zip(token_ids[1:], scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs, strict=True)
    return [
        None,
        *(
            JsonText(partial(parts, token, logprob, rank, ids[:top], values))
            if min(len(ids), top) > WIDE
            else {str(place[0]): entry(place) for place in _ranked(token, logprob, rank, ids[:top], values)}
            for token, logprob, rank, ids, values in rows
        ),
    ]


def _ranked(
    token_id: int, logprob: float, rank: int, ids: Sequence[int], values: Sequence[float]
) -> Iterator[tuple[int, float, int]]:
    """(id, log-probability, rank) of a token, then of the best ones but for it."""
    yield token_id, logprob, rank
    for place, (i, value) in enumerate(zip(ids, values, strict=False), 1):
        if i != token_id:
            yield i, value, place


def chat_logprobs(
    tokenizer: Tokenizer, name: Name, token_ids: Sequence[int], scores: Logprobs, top: int
) -> dict[str, Any]:
    """OpenAI's form for chats: a row for each token, with the `top` best."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": name(token_id), "logprob": _clamp(logprob), "bytes": list(raw)}

    def text(place: tuple[int, float]) -> str:
        i, logprob = place
        own = encode_basestring(name(i))
        return f'{{"token":{own},"logprob":{_clamp(logprob)!r},"bytes":[{byte_list(tokenizer.token_bytes(i))}]}}'

    def parts(token_id: int, logprob: float, ids: Sequence[int], values: Sequence[float]) -> Iterator[str]:
        top_entries = map(text, zip(ids, values, strict=False))
        return listed(f'{text((token_id, logprob))[:-1]},"top_logprobs":[', top_entries, "]}")

    rows = zip(token_ids, scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True)
    content = [
        JsonText(partial(parts, token_id, logprob, ids[:top], values))
        if min(len(ids), top) > WIDE
        else {
            **entry(token_id, logprob),
            "top_logprobs": [entry(i, value) for i, value in zip(ids[:top], values, strict=False)],
        }
        for token_id, logprob, ids, values in rows
    ]
    return {"content": content, "refusal": None}


def byte_list(raw: bytes) -> str:
    """The numbers of bytes, with commas between them."""
    return ",".join(map(str, raw))


def _clamp(logprob: float) -> float:
    return logprob if LOWEST_LOGPROB <= logprob < math.inf else LOWEST_LOGPROB
