"""Where tokens begin in a text, for the kinds of tokenizer that models come with."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lpa_model.checkpoint import save_checkpoint
from server.engine.tokenizer import Tokenizer
from server.protocol.logprobs import TextOffsets, offsets_of_ids
from tests.serving import serving
from tests.tiny import byte_tokenizer, random_model, tiny_config

BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = ["\u2581", *"HieloByINSTfx[]/", "\u2581H", "\u2581[", "el", "lo"]
INST = "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]"


def sentencepiece(*, metaspace: bool = False, first: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """LLaMA-2's normalizer, which puts a space before every section, or Mistral's pre-tokenizer, which does so once."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *LETTERS])}
    merges = [("\u2581", "H"), ("\u2581", "["), ("e", "l"), ("l", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [] if first is None else [first]
    if metaspace:
        backend.normalizer = normalizers.Sequence(before)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        space: list[Any] = [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    else:
        backend.normalizer = normalizers.Sequence(
            [*before, normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        space = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(space)
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


def byte_level(**changes: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(byte_tokenizer().to_str()) | changes))


def with_token(backend: tokenizers.Tokenizer, token: AddedToken) -> tokenizers.Tokenizer:
    backend.add_tokens([token])
    return backend


TRIMMED = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
LSTRIP = AddedToken("<m>", lstrip=True, normalized=False)
RSTRIP = AddedToken("<m>", rstrip=True, normalized=False)


def spans(*parts: str) -> list[int]:
    """Offsets of parts that follow one another in a text."""
    return [sum(map(len, parts[:i])) for i in range(len(parts))]


@pytest.mark.parametrize(
    ("backend", "text", "offsets"),
    [
        pytest.param(
            sentencepiece(),
            INST,
            spans(
                *("<s>", *"[INST]", " H", "i", " [", *"/INST]", " H", "el", "lo", " ", "</s>"),
                *("<s>", *"[INST]", " ", *"Bye", " [", *"/INST]"),
            ),
            id="a space before every section",
        ),
        pytest.param(
            sentencepiece(metaspace=True),
            INST,
            spans(
                *("<s>", *"[INST]", " H", "i", " [", *"/INST]", " H", "el", "lo", " ", "</s>"),
                *("<s>", *"[INST]", " ", *"Bye", " [", *"/INST]"),
            ),
            id="no space behind a special token",
        ),
        pytest.param(sentencepiece(), " Hello", [0, 0, 2, 4], id="a space before a space"),
        pytest.param(sentencepiece(metaspace=True), "Hello H", [0, 1, 3, 5], id="a space at the beginning"),
        pytest.param(sentencepiece(), "H\u00e9\U0001f642 H", [0, 1, 1, 2, 2, 2, 2, 3], id="bytes of characters"),
        pytest.param(sentencepiece(first=normalizers.NFC()), "He\u0301 H", [0, 1, 1, 3], id="NFC"),
        pytest.param(sentencepiece(first=normalizers.NFKC()), "H\ufb01 \uff28", [0, 1, 1, 2], id="NFKC"),
        pytest.param(byte_level(normalizer={"type": "NFC"}), "e\u0301 x", [0, 0, 2, 3], id="NFC of bytes"),
        pytest.param(byte_level(post_processor=TRIMMED), "x  ( x", [0, 1, 2, 3, 4, 5], id="spaces belong to a token"),
        pytest.param(
            byte_level(post_processor=PREFIXED, pre_tokenizer=PREFIXED), "( (", [0, 0, 1, 2], id="a prefix of bytes"
        ),
        pytest.param(with_token(sentencepiece(), LSTRIP), "H  <m> x", [0, 1, 6, 6, 7], id="lstrip"),
        pytest.param(with_token(sentencepiece(), RSTRIP), "H <m>  x", [0, 1, 2, 7, 7], id="rstrip"),
    ],
)
def test_offsets_are_of_the_text_that_was_given(backend: tokenizers.Tokenizer, text: str, offsets: list[int]) -> None:
    tokenizer = Tokenizer(backend, tiny_config())
    ids, found = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert found == offsets, [backend.id_to_token(i) for i in ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_tokens_that_a_tokenizer_adds_begin_where_the_text_goes_on() -> None:
    tokenizer = Tokenizer(sentencepiece(), tiny_config())
    ids, offsets = tokenizer.encode_with_offsets("Hi")
    assert (ids[0], ids[-1], offsets) == (1, 2, [0, 0, 1, 2])


def characters_of_bytes(raw: bytes) -> list[int]:
    """For each byte: which character of raw.decode(errors="replace") it belongs to. Read from the decoder's errors."""
    broken: dict[int, int] = {}

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        broken[error.start] = error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("noted", note)
    text, places = raw.decode(errors="noted"), []
    for number, character in enumerate(text):
        places += [number] * (broken.get(len(places)) or len(character.encode()))
    assert len(places) == len(raw)
    return places


raws = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=3),
        st.text(min_size=1, max_size=3).map(str.encode),
        st.sampled_from([b"\xe2\x82", b"\xf0\x9f\x99", b"\xef\xbf\xbd", b"\xe0\x80", b"\xed\xa0", b"\xc3"]),
    ),
    max_size=12,
)


@given(raws, st.integers(0, 40))
def test_tokens_behind_unfinished_characters(parts: list[bytes], cut: int) -> None:
    """Of ids alone: the offset of a token is its first byte's character, however bytes are cut into tokens."""
    tokenizer = Tokenizer(byte_tokenizer(), tiny_config())
    of_byte = {tokenizer.token_bytes(i): i for i in range(1, 300) if len(tokenizer.token_bytes(i)) == 1}
    raw = b"".join(parts)
    ids = [of_byte[bytes([byte])] for byte in raw]
    assert offsets_of_ids(tokenizer, ids) == characters_of_bytes(raw)
    assert tokenizer.decode(ids) == raw.decode(errors="replace")
    counted = TextOffsets(tokenizer, 7)
    assert counted.take(ids[:cut]) + counted.take(ids[cut:]) == [7 + place for place in characters_of_bytes(raw)]


@pytest.mark.parametrize("metaspace", [False, True])
@given(st.text(alphabet="Hel ox[\n\u00e9\U0001f642", max_size=12))
def test_ids_alone_have_the_offsets_of_their_own_text(metaspace: bool, text: str) -> None:
    tokenizer = Tokenizer(sentencepiece(metaspace=metaspace), tiny_config())
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if not text.startswith(" "):  # where a tokenizer has put no space, its decoder takes one all the same
        assert decoded == text == tokenizer.backend.decode(ids, skip_special_tokens=False)
    begins = offsets_of_ids(tokenizer, ids)
    for token, begin in zip(ids, begins, strict=True):
        try:
            piece = tokenizer.token_bytes(token).decode()
        except UnicodeDecodeError:
            continue
        assert decoded.startswith(piece, begin) or (begin == 0 and decoded.startswith(piece[1:]))


def test_offsets_over_http_are_of_the_given_text(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, random_model(tiny_config()), sentencepiece(), torch.float32)
    ids, expected = Tokenizer(sentencepiece(), tiny_config()).encode_with_offsets(INST, add_special_tokens=False)
    with serving(tmp_path) as served:
        (choice,) = served.complete(
            prompt=INST, echo=True, logprobs=0, max_tokens=1, add_special_tokens=False, skip_special_tokens=False
        )["choices"]
        assert choice["text"].startswith(INST)
        assert choice["logprobs"]["text_offset"] == [*expected, len(INST)]
        added = served.complete(prompt="Hi", echo=True, logprobs=0, max_tokens=0)["choices"][0]
        assert added["logprobs"]["text_offset"] == [0, 0, 1, 2]
        answer = served.post("/v1/perplexity", input=INST, return_tokens=True).json()
        (entry,) = answer["data"]
        assert [token["offset"] for token in entry["tokens"]] == expected
        answer = served.post("/v1/perplexity", input=ids, return_tokens=True).json()
        text = "<s> [INST] Hi [/INST] Hello </s><s> [INST] Bye [/INST]"  # as the ids are written
        for token in answer["data"][0]["tokens"]:
            assert text.startswith(token["text"], token["offset"])
