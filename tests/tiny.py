"""Tiny random models of both settings, with a byte-level tokenizer; nothing comes from a network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lpa_model.checkpoint import save_checkpoint
from lpa_model.config import Architecture, LPAConfig
from lpa_model.model import LPAForCausalLM

VOCAB_SIZE = 300
END_OF_TEXT_ID = 0
CORPUS = """Once upon a time there was a little robot who lived by the sea. The robot liked the sound of the waves,
and every day it went to the shore to hear them. "What do the waves say?" asked a gull. "They say the same thing
every day," said the robot, "and that is why I like them." The gull thought about that for a long time."""


def tiny_config(architecture: Architecture = "setting2", **changes: Any) -> LPAConfig:
    """Two layers, hidden size 32, four heads of 8, rank 8, 300 tokens, 128 positions; `changes` replace any key."""
    keys: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_rank": 8,
        "max_position_embeddings": 128,
        "eos_token_id": END_OF_TEXT_ID,
    }
    return LPAConfig(**{**keys, **changes})


def random_model(config: LPAConfig, seed: int = 0) -> LPAForCausalLM:
    """A float32 model whose every parameter is random, norms and biases too, with outputs that differ by token."""
    model = LPAForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "embed" in name else 0.2, generator=generator)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """300 entries: <|endoftext|> is 0, then all 256 bytes, then merges learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def write_checkpoint(folder: Path, config: LPAConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save `random_model(config, seed)` and the byte tokenizer as a native folder; returns the folder."""
    save_checkpoint(folder, random_model(config, seed), byte_tokenizer(), dtype)
    return folder
