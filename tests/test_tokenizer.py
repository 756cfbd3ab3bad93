"""Text to token ids in pieces, and beside other threads."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from server.engine import tokenizer as module
from server.engine.tokenizer import Tokenizer
from tests.tiny import CORPUS, byte_tokenizer, tiny_config


def with_changes(**changes: Any) -> Tokenizer:
    """The byte tokenizer with other parts of tokenizer.json."""
    return Tokenizer(Backend.from_str(json.dumps(json.loads(byte_tokenizer().to_str()) | changes)), tiny_config())


words = st.sampled_from(
    ["the", "robot", "sea", "don't", "3", "1st", "é", "🙂", "<|endoftext|>", "(a)", "--", "I'", "s"]
)
spaces = st.sampled_from([" ", " ", " ", "  ", "\n", " \n", "\t ", "\u00a0", ""])
texts = st.lists(st.tuples(words, spaces), max_size=60).map(lambda parts: "".join(w + s for w, s in parts))


@given(texts, st.integers(1, 20))
def test_pieces_give_the_ids_of_the_whole(text: str, size: int) -> None:
    tokenizer = with_changes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        assert tokenizer.encode(text) == byte_tokenizer().encode(text).ids


def test_a_long_text_is_cut_where_words_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 20)
    pieces = list(with_changes()._pieces(CORPUS))
    assert "".join(pieces) == CORPUS
    assert len(pieces) > 10
    assert max(map(len, pieces)) < 80


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }
        },
        {"added_tokens": [{**json.loads(byte_tokenizer().to_str())["added_tokens"][0], "rstrip": True}]},
        {"added_tokens": [{**json.loads(byte_tokenizer().to_str())["added_tokens"][0], "lstrip": True}]},
    ],
)
def test_other_tokenizers_take_a_text_whole(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 20)
    tokenizer = with_changes(**changes)
    assert list(tokenizer._pieces(CORPUS)) == [CORPUS]
    assert tokenizer.encode(CORPUS) == tokenizer.backend.encode(CORPUS).ids


def test_other_threads_run_while_a_text_is_tokenized() -> None:
    """Were the lock held, the other thread would stand still from the beginning to the end."""
    tokenizer = with_changes()
    text = CORPUS * 700
    assert len(list(tokenizer._pieces(text))) == 1
    done = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    tokenizer.encode(text)
    ended = time.perf_counter()
    done.set()
    thread.join()
    assert sum(began < tick < ended for tick in ticks) > 5
