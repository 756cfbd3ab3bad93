"""Tokenizers from text, and text to token ids in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lpa_model.train.text import paragraphs

END_OF_TEXT = "<|endoftext|>"
TokenIds = NDArray[np.unsignedinteger[Any]]
"""Of a text: uint16, or uint32 where the vocabulary has more entries than that holds."""
TRAINED_ON = 1 << 30
"""Characters of the text, from its beginning, that a tokenizer is trained on: the trainer holds all different words."""
PIECES, CHARACTERS = 4096, 1 << 22
"""Pieces, and characters of them, that are encoded together."""


def train_tokenizer(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose entry 0 is the end-of-text token between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(pieces), trainer)
    return tokenizer


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    count = 0
    for piece in pieces:
        if count >= TRAINED_ON:
            return
        count += len(piece)
        yield from piece.splitlines(keepends=True)


def id_type(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16, or uint32 where the vocabulary has more entries than that holds."""
    return np.min_scalar_type(max(1 << 8, tokenizer.get_vocab_size() - 1))


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[TokenIds]:
    """Token ids of pieces of text, some pieces at a time."""
    kind = id_type(tokenizer)
    for some in _batches(pieces):
        encodings = tokenizer.encode_batch(some, add_special_tokens=False)
        yield np.concatenate([np.array(encoding.ids, dtype=kind) for encoding in encodings])


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    count = 0
    for piece in pieces:
        some.append(piece)
        count += len(piece)
        if len(some) == PIECES or count >= CHARACTERS:
            yield some
            some, count = [], 0
    if some:
        yield some


def encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    """Token ids of a text, encoded paragraph by paragraph."""
    none = np.zeros(0, dtype=id_type(tokenizer))
    return np.concatenate([none, *encode_pieces(tokenizer, paragraphs([text]))])
