"""Log-probabilities as OpenAI's completions show them: columns over a run of tokens."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer

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


def _top(name: Name, token_id: int, logprob: float, ids: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Best first; of two tokens with one text the better keeps it, and the other is called token_id:N."""
    entries = list(zip(ids, values, strict=True))
    if token_id not in ids:
        entries.append((token_id, logprob))
    found: dict[str, float] = {}
    for i, value in entries:
        text = name(i)
        # the token's own number is the same float in both places: clients compare them to see if it was the best
        found[f"token_id:{i}" if text in found else text] = logprob if i == token_id else _clamp(value)
    return found


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: Logprobs, top: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then for each the token itself and the `top` best, by token id."""
    rows = zip(token_ids[1:], scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs, strict=True)
    return [
        None,
        *(
            {
                str(i): {"logprob": _clamp(value), "rank": place, "decoded_token": tokenizer.token_text(i)}
                for i, value, place in ((token, logprob, rank), *_ranked(ids[:top], values))
            }
            for token, logprob, rank, ids, values in rows
        ),
    ]


def _ranked(ids: Sequence[int], values: Sequence[float]) -> Iterator[tuple[int, float, int]]:
    return ((i, value, rank) for rank, (i, value) in enumerate(zip(ids, values, strict=False), 1))


def chat_logprobs(
    tokenizer: Tokenizer, name: Name, token_ids: Sequence[int], scores: Logprobs, top: int
) -> dict[str, Any]:
    """OpenAI's form for chats: a row for each token, with the `top` best."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": name(token_id), "logprob": _clamp(logprob), "bytes": list(raw)}

    rows = zip(token_ids, scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True)
    content = [
        {
            **entry(token_id, logprob),
            "top_logprobs": [entry(i, value) for i, value in zip(ids[:top], values, strict=False)],
        }
        for token_id, logprob, ids, values in rows
    ]
    return {"content": content, "refusal": None}


def _clamp(logprob: float) -> float:
    return logprob if LOWEST_LOGPROB <= logprob < math.inf else LOWEST_LOGPROB
