"""Random weights: those that training begins with, and whole model folders behind `lpa init`.

Such folders have a synthetic tokenizer and are for benchmarks and tests. They have the sizes and the speed of a
trained model and know nothing: they never stand in for one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import LPAConfig
from lpa_model.model import LPAForCausalLM
from lpa_model.train.tokenizer import END_OF_TEXT

NUM_BYTES = 256
SPACE = "Ġ"  # how byte-level tokenizers spell the byte of a space
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # frequent ones first, so that small vocabularies hold useful pairs

README = """\
# Random weights

This folder was made by `lpa init` with seed {seed}: {parameters:,} random parameters in the shape of a real model,
and a synthetic tokenizer. It has never seen text, and what it writes means nothing. It is for benchmarks and
tests of the server; do not report its perplexity or compare its output with a trained model's.
"""


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with exactly `vocab_size` entries, the same at every call.

    Entries 0..255 are the bytes, 256 is <|endoftext|>, the rest are merges: every string of two letters (the first
    may be a space), then of three, and so on, each made of the string without its last letter and that letter. Any
    reader of the tokenizers library's BPE format takes it; the pre-tokenizer is GPT-2's.

    Raises:
        ValueError: `vocab_size` is less than 257.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(f"vocab_size: {vocab_size} is less than {NUM_BYTES + 1}, the bytes and {END_OF_TEXT}")
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab[END_OF_TEXT] = NUM_BYTES
    merges = list(itertools.islice(_merges(), vocab_size - len(vocab)))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    for length in itertools.count(1):
        for first, *rest in itertools.product(SPACE + LETTERS, *[LETTERS] * (length - 1)):
            for last in LETTERS:
                yield "".join((first, *rest)), last


def initialize(model: LPAForCausalLM, seed: int) -> None:
    """Normal weights: 0.02 for embeddings, 1/sqrt(fan in) for matrices, smaller where a branch joins the stream."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
                if ".o_proj." in name or ".down_proj." in name:
                    std *= depth if name.endswith((".up.weight", "_proj.weight")) else 1.0
                parameter.normal_(std=std, generator=generator)


def init_model(config: LPAConfig, folder: Path, seed: int, dtype: torch.dtype) -> LPAConfig:
    """Write a model folder with random weights of `config`'s shape; the config written has the tokenizer's EOS id.

    Beside the native folder's files there is a tokenizer_config.json, which other servers ask for, and a README.md.
    The weights follow from the seed and the config alone.

    Raises:
        ValueError: `vocab_size` is too small for a byte-level tokenizer.
    """
    tokenizer = synthetic_tokenizer(config.vocab_size)
    config = dataclasses.replace(config, eos_token_id=tokenizer.token_to_id(END_OF_TEXT))
    model = LPAForCausalLM(config)
    initialize(model, seed)
    save_checkpoint(folder, model, tokenizer, dtype)
    for_others = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(for_others, indent=2) + "\n", encoding="utf-8")
    readme = README.format(seed=seed, parameters=config.parameter_count())
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return config
