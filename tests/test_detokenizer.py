"""Incremental text: whole characters, exact stop strings, nothing lost."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from server.engine.detokenizer import Detokenizer
from server.engine.tokenizer import Tokenizer
from tests.tiny import END_OF_TEXT_ID, byte_tokenizer, tiny_config


def wrapped() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), tiny_config())


def byte_ids(raw: bytes) -> list[int]:
    tokenizer = wrapped()
    of_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [of_byte[bytes([b])] for b in raw]


def stream(ids: list[int], stop: list[str] | None = None, min_tokens: int = 0) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(wrapped(), stop or [], min_tokens)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.append(token))
        if detokenizer.stopped is not None:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


@given(st.lists(st.integers(1, 299)))
def test_pieces_join_to_the_whole_text(ids: list[int]) -> None:
    pieces, _ = stream(ids)
    raw = b"".join(wrapped().token_bytes(i) for i in ids)
    assert "".join(pieces) == raw.decode(errors="replace")
    assert "".join(pieces) == wrapped().decode(ids)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=5), max_size=4))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = stream(byte_ids(text.encode()), stop)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    if ends:
        # the stop string that is complete first; of those complete at once, the one that began first
        first_complete = min(end for end, _ in ends)
        assert "".join(pieces) == text[: min(start for end, start in ends if end == first_complete)]
        assert stopped in stop
    else:
        assert ("".join(pieces), stopped) == (text, None)


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_only_what_could_begin_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    detokenizer, given_out, seen = Detokenizer(wrapped(), stop), "", ""
    for token, character in zip(byte_ids(text.encode()), text, strict=True):
        given_out += detokenizer.append(token)
        seen += character
        if detokenizer.stopped is not None:
            break
        held = seen[len(given_out) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_a_character_split_over_tokens_comes_whole() -> None:
    pieces, _ = stream(byte_ids("né🙂".encode()))
    assert pieces == ["n", "", "é", "", "", "", "🙂", ""]


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    pieces, _ = stream(byte_ids("a🙂".encode()[:-1]))
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_silent_and_do_not_break_characters() -> None:
    assert "".join(stream([*byte_ids(b"ab"), END_OF_TEXT_ID])[0]) == "ab"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    ids = byte_ids(b"xaxax")
    assert "".join(stream(ids, ["x"], min_tokens=1)[0]) == "xa"
    assert stream(ids, ["x"], min_tokens=5) == (["x", "a", "x", "a", "x", ""], None)


def test_token_text_and_bytes() -> None:
    tokenizer = wrapped()
    (euro,) = [byte_ids(b"\xe2")]
    assert tokenizer.token_text(euro[0]) == "bytes:\\xe2"
    assert tokenizer.token_bytes(euro[0]) == b"\xe2"
    assert tokenizer.token_text(END_OF_TEXT_ID) == "<|endoftext|>"
    for text in ("Once upon a time", "  two  spaces\n\ttab", "naïve 🙂"):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text
    assert tokenizer.encode("a<|endoftext|>b")[1] == END_OF_TEXT_ID


def sentencepiece_like() -> tokenizers.Tokenizer:
    """LLaMA's form: U+2581 for spaces, <0xNN> for bytes that have no token."""
    vocab = {"<unk>": 0, "\u2581a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def test_sentencepiece_tokens_keep_their_spaces() -> None:
    tokenizer = Tokenizer(sentencepiece_like(), tiny_config())
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.append(i) for i in (1, 2, 1, 3, 4)] == [" a", "b", " a", "", "é"]


def test_unsupported_tokenizers_are_refused() -> None:
    spec = json.loads(byte_tokenizer().to_str())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), tiny_config())
