"""Models that score in this process, and the convention that is asked of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lpa_model.backends.features import resolve_device, resolve_dtype
from lpa_model.checkpoint import load_model, weights_hash
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Convention, adds_bos, resolve_convention
from server.engine.fingerprint import fingerprint
from server.engine.tokenizer import Tokenizer, load_tokenizer
from server.settings import Settings


@dataclass(frozen=True)
class Scorer:
    """A model ready to compute, and its tokenizer."""

    model: LPAForCausalLM
    tokenizer: Tokenizer
    dtype: str
    fingerprint: str


def load(folder: Path, settings: Settings) -> Scorer:
    """The model of a folder, on the device and in the type of the settings; CheckpointError names what is wrong."""
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    model = load_model(folder, dtype, device)
    name = str(dtype).removeprefix("torch.")
    found = fingerprint(weights_hash(folder), f"torch ({device}, {name})")
    return Scorer(model, load_tokenizer(folder, model.config), name, found)


def convention_of(scorer: Scorer, asked: dict[str, Any], context: int | None = None) -> Convention:
    """Arguments of `resolve_convention` filled in from the model, whose context is `context` if that is shorter.

    Raises:
        ValueError: "field: reason".
    """
    config = scorer.model.config
    return resolve_convention(
        **asked,
        context=min(config.max_position_embeddings, context or config.max_position_embeddings),
        bos_token_id=config.bos_token_id,
        eos_token_id=scorer.tokenizer.eos_token_id,
        adds_bos=adds_bos(scorer.tokenizer.backend, config.bos_token_id),
    )


def common_convention(a: Scorer, b: Scorer, asked: dict[str, Any]) -> Convention:
    """The same for two models whose tokens are to be paired; the shorter context counts.

    Raises:
        ValueError: "field: reason", or tokens of the two are not the same.
    """
    if a.tokenizer.backend.to_str() != b.tokenizer.backend.to_str():
        raise ValueError(
            "compare: the models have different tokenizers, so that their tokens cannot be paired; score the texts "
            "with each, and compare bits per byte"
        )
    if a.tokenizer.vocab_size != b.tokenizer.vocab_size:
        sizes = f"{a.tokenizer.vocab_size} and {b.tokenizer.vocab_size}"
        raise ValueError(f"compare: the models have logits for {sizes} tokens, which have no divergence")
    contexts = [scorer.model.config.max_position_embeddings for scorer in (a, b)]
    found, other = (convention_of(scorer, asked, min(contexts)) for scorer in (a, b))
    if found != other:
        raise ValueError("compare: the models have different BOS or EOS tokens, so that their windows differ")
    return found
