"""Text of files as token files: streamed, strictly read, and bad input named by file and line."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lpa_model.train.data import prepare, tokenize
from lpa_model.train.text import paragraphs, pieces, read_text
from lpa_model.train.tokenizer import END_OF_TEXT, encode
from lpa_model.train.tokens import read_tokens, write_tokens
from tests.tiny import CORPUS, byte_tokenizer


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


@given(st.text(alphabet="a \n", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_paragraphs_do_not_depend_on_how_a_text_is_read(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    blocks = [text[a:b] for a, b in itertools.pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpa_model.train.text.LONGEST_PIECE", 7)
        found = list(paragraphs(blocks))
        assert found == list(paragraphs([text]))
    assert "".join(found) == text
    assert all(0 < len(piece) <= 7 for piece in found)
    assert "".join(paragraphs(blocks)) == text
    *parts, last = text.split("\n\n")
    assert list(paragraphs(blocks)) == [part + "\n\n" for part in parts] + [last] * bool(last)


def test_line_ends_and_byte_order_marks_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(path) == "one\ntwo\nthree\n"
    assert "".join(pieces([path], END_OF_TEXT)) == "one\ntwo\nthree\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_documents_of_jsonl_end_in_the_token_between_them(tmp_path: Path, name: str) -> None:
    texts = ["One.\n\nTwo.", "Three 猫"]
    lines = [json.dumps({"id": i, "story": text}) for i, text in enumerate(texts)]
    content = codecs.BOM_UTF8 + "\n\n".join([*lines, json.dumps({"story": ""})]).encode()
    path, tokenizer = tmp_path / name, byte_tokenizer()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    _, tokens = tokenize([path], tmp_path, tokenizer=tokenizer, field="story")
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert tokens.ids.tolist() == [id for text in texts for id in [*tokenizer.encode(text).ids, end]]
    assert tokens.documents == 2
    assert tokens.num_bytes == len("".join(texts).encode())
    assert tokens.end_of_text == end


def test_texts_of_several_files_are_kept_apart(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = {"a.txt": "One.\n", "b.txt": f"Two.\n{END_OF_TEXT}\n", "c.txt": "Three."}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    reads: list[int] = []
    sources = [tmp_path / name for name in texts]
    _, tokens = tokenize(sources, tmp_path, tokenizer=tokenizer, report=lambda task, read: reads.append(read))
    whole = f"One.\n{END_OF_TEXT}Two.\n{END_OF_TEXT}\nThree."
    assert tokens.ids.tolist() == tokenizer.encode(whole).ids
    assert tokens.documents == 3
    assert reads == sorted(reads) and reads[-1] == sum(path.stat().st_size for path in sources)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: has no text"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: has no text"),
        ("a.txt", b"one\ntwo\n\xff\n", r"a\.txt, line 3: not UTF-8 \(byte 0xff\)"),
        ("a.txt", b"one\n\xe7\x8c", r"a\.txt, line 2: not UTF-8 \(byte 0xe7\)"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], r"a\.txt\.gz: truncated, or not a gzip file"),
        ("a.txt.gz", b"text", r"a\.txt\.gz: truncated, or not a gzip file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', r"a\.jsonl, line 2: has no field 'text', but 'body'"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl, line 1: 'text' is not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl, line 1: not JSON"),
    ],
)
def test_bad_text_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize([tmp_path / name], tmp_path, tokenizer=byte_tokenizer())
    assert not (tmp_path / "tokens.safetensors").exists()


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpa_model.train.text.LONGEST_LINE", 30)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 17}) + "\n" + json.dumps({"text": "a" * 19}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: is longer than 30 bytes"):
        list(pieces([tmp_path / "a.jsonl"], END_OF_TEXT))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("BLOCK", "LONGEST_PIECE"):
        monkeypatch.setattr(f"lpa_model.train.text.{constant}", 1 << 15)
    line = "no blank line anywhere " * 40
    content = ((json.dumps({"text": line}) if name == "a.jsonl" else line) + "\n").encode() * 3_000
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    tracemalloc.start()
    try:
        count = sum(len(piece) for piece in pieces([tmp_path / name], ""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count >= 3_000 * len(line)
    assert peak < len(content) / 4


def test_a_token_file_is_a_safetensors_file(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    written = write_tokens(tmp_path / "a", tokenizer, [CORPUS, END_OF_TEXT, CORPUS], END_OF_TEXT, ("a.txt", "b.txt"))
    expected = tokenizer.encode(f"{CORPUS}{END_OF_TEXT}{CORPUS}").ids
    assert load_file(tmp_path / "a")["tokens"].tolist() == expected == written.ids.tolist()
    assert isinstance(written.ids, np.memmap) and written.ids.dtype == np.uint16
    with safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata()["documents"] == "2"
    assert written.sources == ("a.txt", "b.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_token_files_are_read_strictly(tmp_path: Path) -> None:
    tokenizer, path = byte_tokenizer(), tmp_path / "a"
    write_tokens(path, tokenizer, [CORPUS], END_OF_TEXT)
    whole = path.read_bytes()
    other = byte_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        read_tokens(path, other)
    for size in (0, 5, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            read_tokens(path, tokenizer)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="its header speaks of"):
        read_tokens(path, tokenizer)
    for old, new in ((b"U16", b"F16"), (b'"tokens"', b'"tokeny"'), (b"data_offsets", b"data_offsetz")):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="not a file of tokens"):
            read_tokens(path, tokenizer)


def test_runs_on_folders_of_tokens(tmp_path: Path) -> None:
    texts = {"train": CORPUS * 3, "valid": CORPUS, "other": CORPUS}
    folders = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        folders[name].mkdir()
        (tmp_path / f"{name}.txt").write_text(text)
        tokenize([tmp_path / f"{name}.txt"], folders[name], tokenizer=270 if name == "other" else byte_tokenizer())
    out = tmp_path / "run"
    out.mkdir()
    found = prepare(folders["train"], folders["valid"], out, 300)
    assert found.tokenizer.decode(found.train.ids.tolist()) == CORPUS * 3
    assert found.valid.num_bytes == len(CORPUS.encode())
    assert (out / "tokenizer.json").exists() and not (out / "tokens.safetensors").exists()
    assert np.array_equal(prepare(folders["train"], tmp_path / "valid.txt", out, 300).valid.ids, found.valid.ids)
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        prepare(folders["train"], folders["other"], out, 300)
    (out / "state.pt").touch()
    with pytest.raises(ValueError, match="an earlier start had another tokenizer"):
        prepare(folders["other"], folders["valid"], out, 300)
    with pytest.raises(ValueError, match="an earlier start was on a folder of tokens"):
        prepare(tmp_path / "train.txt", folders["valid"], out, 300)


def test_another_text_in_the_same_run_is_refused(tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "a.txt"
    out.mkdir()
    data.write_text(CORPUS)
    prepare(data, data, out, 270)
    (out / "state.pt").touch()
    data.write_text(CORPUS + " More.")
    with pytest.raises(ValueError, match=r"an earlier start was on a\.txt \(\d+ bytes\), and data is a\.txt"):
        prepare(data, data, out, 270)


def test_a_start_without_a_state_binds_nothing(tmp_path: Path) -> None:
    out, data, valid = tmp_path / "run", tmp_path / "a.txt", tmp_path / "b.txt"
    out.mkdir()
    valid.write_text(CORPUS)
    for text, entries in ((CORPUS, 270), (CORPUS, 280), (CORPUS + " More.", 280)):
        data.write_text(text)
        found = prepare(data, valid, out, entries)
        assert found.tokenizer.get_vocab_size() == entries
        assert found.tokenizer.decode(found.train.ids.tolist()) == text
    kept = (out / "tokens.safetensors").stat().st_mtime_ns
    prepare(data, valid, out, 280)
    assert (out / "tokens.safetensors").stat().st_mtime_ns == kept
    tokens = out / "tokens.safetensors"
    earlier = tokens.read_bytes()
    prepare(data, valid, out, 290)
    tokens.write_bytes(earlier)  # as if killed between the tokenizer and its tokens
    found = prepare(data, valid, out, 290)
    assert found.tokenizer.decode(found.train.ids.tolist()) == data.read_text()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CORPUS)
    with pytest.raises(ValueError, match="field: 'body' has no effect"):
        tokenize([tmp_path / "a.txt"], tmp_path, tokenizer=270, field="body")
    with pytest.raises(ValueError, match="end_of_text: the tokenizer has no token '</s>'"):
        tokenize([tmp_path / "a.txt"], tmp_path, tokenizer=byte_tokenizer(), end_of_text="</s>")
