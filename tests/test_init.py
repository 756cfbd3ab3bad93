"""Random-weight models: the right shape, reproducible, and a tokenizer that is whole at any size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lpa_model.checkpoint import load_model, load_tokenizer
from lpa_model.config import PRESETS, Architecture
from lpa_model.init import init_model, synthetic_tokenizer
from tests.tiny import tiny_config


@pytest.mark.parametrize("size", sorted({257, 258, 300, 32001, 60000} | {c.vocab_size for c in PRESETS.values()}))
def test_tokenizer_has_exactly_the_vocabulary_asked_for(size: int) -> None:
    tokenizer = synthetic_tokenizer(size)
    saved = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = saved["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(size))
    assert tokenizer.get_vocab_size() == size
    known = {token for token, i in vocab.items() if i < 256}
    for left, right in saved["model"]["merges"]:  # each merge is made of tokens that came before it
        assert {left, right} <= known
        known.add(left + right)
    assert known | {"<|endoftext|>"} == set(vocab)
    assert [(t["content"], t["id"], t["special"]) for t in saved["added_tokens"]] == [("<|endoftext|>", 256, True)]
    assert len(saved["model"]["merges"]) == size - 257


@pytest.fixture(scope="module")
def wide() -> Tokenizer:
    return synthetic_tokenizer(4096)


@given(text=st.text())
def test_every_text_survives_the_tokenizer(wide: Tokenizer, text: str) -> None:
    ids = wide.encode(text).ids
    assert wide.decode(ids, skip_special_tokens=False) == text
    assert len(ids) <= len(text.encode())


def test_tokenizer_shortens_words_and_knows_the_end_of_text(wide: Tokenizer) -> None:
    assert len(wide.encode(" the thing in there").ids) <= 11
    assert wide.encode("a<|endoftext|>b").ids[1] == 256


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: 256 is less than 257"):
        synthetic_tokenizer(256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_init_writes_a_folder_that_loads(tmp_path: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    config = tiny_config(architecture, eos_token_id=None)
    written = init_model(config, tmp_path / "m", seed=5, dtype=dtype)
    assert written.eos_token_id == 256
    model = load_model(tmp_path / "m", dtype, torch.device("cpu"))
    assert model.config == written
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {dtype}
    assert load_tokenizer(tmp_path / "m").get_vocab_size() == config.vocab_size
    logits = model.logits(model(torch.tensor([[1, 2, 3]])))
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert "never seen text" in (tmp_path / "m" / "README.md").read_text()


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        init_model(tiny_config(), tmp_path / name, seed, torch.float32)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["embed_tokens.weight"], c["embed_tokens.weight"])
