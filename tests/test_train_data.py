"""Text of files as token files: streamed, strictly read, and bad input named by file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from lpa_model.train.data import prepare
from lpa_model.train.text import read_text
from lpa_model.train.tokenizer import END_OF_TEXT, encode
from tests.conftest import CORPUS, byte_tokenizer


def test_ids_of_a_large_vocabulary_are_kept_whole() -> None:
    words = {f"w{i}": i for i in range(70_000)}
    large = Tokenizer(models.WordLevel(words, unk_token="w0"))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode(large, "w65535 w65536\n\nw69999").tolist() == [65535, 65536, 69999]
    assert encode(byte_tokenizer(), CORPUS).dtype == np.uint16


def test_encoding_in_pieces_equals_encoding_at_once() -> None:
    tokenizer = byte_tokenizer()
    text = f"{CORPUS}\n\n{CORPUS}\n{END_OF_TEXT}\nNaïve 猫\n\n\n\n  the end\n\n"
    assert encode(tokenizer, text).tolist() == tokenizer.encode(text).ids
    assert tokenizer.decode(encode(tokenizer, text).tolist(), skip_special_tokens=False) == text


def test_prepare_reads_gzip_and_keeps_its_work(tmp_path: Path) -> None:
    text = f"{CORPUS}\n{END_OF_TEXT}\n" * 3
    data, valid, out = tmp_path / "train.txt.gz", tmp_path / "valid.txt", tmp_path / "run"
    data.write_bytes(gzip.compress(text.encode()))
    valid.write_text(CORPUS)
    out.mkdir()
    found = prepare(data, valid, out, 280)
    tokenizer, tokens = found.tokenizer, found.train.ids
    assert read_text(data) == text
    assert tokenizer.decode(found.valid.ids.tolist()) == CORPUS
    assert found.valid.num_bytes == len(CORPUS.encode())
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert tokens.tolist().count(0) == 3
    data.unlink()  # the second start needs it no more
    again = prepare(data, valid, out, 280)
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert np.array_equal(again.train.ids, tokens)
