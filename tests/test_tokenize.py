"""Text to tokens and back over HTTP, in the shapes that lm-evaluation-harness reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from lpa_model.config import Architecture
from server.engine.chat_template import DEFAULT_TEMPLATE
from server.engine.tokenizer import Tokenizer as EngineTokenizer
from tests.serving import Served, serving
from tests.templates import CHATML
from tests.tiny import VOCAB_SIZE, byte_tokenizer, tiny_config, write_checkpoint

TEXT = 'The robot said: "çava, 你好 🙂"\n\n and the waves'
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The sea"}]


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose tokenizer begins texts with <|endoftext|>, and which has a chat template of its own."""
    folder = write_checkpoint(tmp_path_factory.mktemp("bos") / "model", tiny_config())
    backend = Tokenizer.from_str(byte_tokenizer().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": CHATML, "bos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 99, "more": [1]}))
    with serving(folder) as server:
        yield server


def ask(served: Served, path: str, **body: Any) -> dict[str, Any]:
    response = served.client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_tokens_of_a_text_and_back(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    answer = ask(served, "/tokenize", model="tiny", prompt=TEXT, return_token_strs=True)
    assert answer == {
        "count": len(ids),
        "max_model_len": 128,
        "tokens": ids,
        "token_strs": [tokenizer.id_to_token(i) for i in ids],
    }
    assert ask(served, "/tokenize", prompt=TEXT, add_special_tokens=False) == {**answer, "token_strs": None}
    assert ask(served, "/detokenize", model="tiny", tokens=ids) == {"prompt": TEXT}
    assert ask(served, "/detokenize", tokens=[]) == {"prompt": ""}
    assert ask(served, "/tokenize", prompt="")["tokens"] == []
    long = TEXT * 200  # beside the event loop
    assert ask(served, "/detokenize", tokens=ask(served, "/tokenize", prompt=long)["tokens"])["prompt"] == long


def test_special_tokens(served: Served, with_bos: Served) -> None:
    assert ask(served, "/tokenize", prompt="a<|endoftext|>b")["tokens"] == [65, 0, 66]
    assert ask(served, "/detokenize", tokens=[65, 0, 66]) == {"prompt": "a<|endoftext|>b"}
    assert ask(with_bos, "/tokenize", prompt="ab")["tokens"] == [0, 65, 66]
    assert ask(with_bos, "/tokenize", prompt="ab", add_special_tokens=False)["tokens"] == [65, 66]


def test_a_conversation_is_tokenized_in_the_models_template(with_bos: Served, tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nThe sea"

    def tokens(**body: Any) -> str:
        found: str = tokenizer.decode(ask(with_bos, "/tokenize", messages=TALK, **body)["tokens"], False)
        return found

    assert tokens() == f"{text}<|im_end|>\n<|im_start|>assistant\n"  # and no BOS in front
    assert tokens(add_generation_prompt=False) == f"{text}<|im_end|>\n"
    assert tokens(continue_final_message=True) == text
    assert tokens(add_generation_prompt=False, continue_final_message=True) == text
    assert tokens(add_special_tokens=True).startswith("<|endoftext|><|im_start|>")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert (
        ask(with_bos, "/tokenize", messages=parts)["tokens"]
        == (ask(with_bos, "/tokenize", messages=[{"role": "user", "content": "Hel\nlo"}])["tokens"])
    )


def test_the_tokenizers_settings(served: Served, with_bos: Served) -> None:
    assert served.client.get("/tokenizer_info").json() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": None,
        "chat_template": DEFAULT_TEMPLATE,
        "model_max_length": 128,
        "vocab_size": VOCAB_SIZE,
    }
    assert with_bos.client.get("/tokenizer_info").json() == {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": None,
        "chat_template": CHATML,
        "model_max_length": 99,
        "vocab_size": VOCAB_SIZE,
        "more": [1],
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": TALK}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": "Hello"}, "messages"),
        ("/tokenize", {"messages": ["Hello"]}, "messages[0]"),
        ("/tokenize", {"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [*TALK, {"role": "clown", "content": "x"}]}, "messages[2].role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
        ("/tokenize", {"messages": TALK, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (
            "/tokenize",
            {"messages": TALK, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_a_wrong_field_is_named(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    headers = {"content-type": "application/json"}
    response = served.client.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param


def test_lm_evaluation_harness_reads_it(served: Served) -> None:
    """The three requests of its remote tokenizer, with the fields that it looks at."""
    info = httpx.get(f"{served.url}/tokenizer_info").json()
    payload = {"prompt": info["eos_token"], "add_special_tokens": False}
    tokens = httpx.post(f"{served.url}/tokenize", json=payload).json()["tokens"]
    assert tokens == [0]
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json()["prompt"] == info["eos_token"]


PIECES = st.characters(codec="utf-8") | st.sampled_from(["<|endoftext|>", "  ", "\r\n", "\x00", "e\u0301", "robot"])


@given(st.lists(PIECES).map("".join))
def test_every_text_comes_back(text: str) -> None:
    tokenizer = EngineTokenizer(byte_tokenizer(), tiny_config())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
