"""Two models side by side on the same texts. They compute without the engine, which gives no whole distributions."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import torch

from lpa_model.backends.features import resolve_device, resolve_dtype
from lpa_model.checkpoint import load_model, stored_weights
from lpa_model.compare import Comparison, compare_windows
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Convention
from server.engine.tokenizer import Tokenizer, load_tokenizer
from server.errors import EngineError
from server.scoring.local import size_of, tokenized
from server.scoring.perplexity import Corpus, convention_of, pieces
from server.scoring.texts import Advance, Source
from server.settings import Settings


@dataclass(frozen=True)
class Side:
    """A model ready to compute, and its tokenizer."""

    model: LPAForCausalLM
    tokenizer: Tokenizer
    dtype: str

    @property
    def context(self) -> int:
        """Of the model, in tokens."""
        return self.model.config.max_position_embeddings


def load(folder: Path, settings: Settings) -> Side:
    """The model of a folder, on the device and in the type of the settings; CheckpointError names what is wrong."""
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    model = load_model(folder, dtype, device)
    name, stored = str(dtype).removeprefix("torch."), stored_weights(folder)
    types = name if stored is None else f"{name}, {stored} weights"
    return Side(model, load_tokenizer(folder, model.config), types)


def common_convention(a: Side, b: Side, asked: dict[str, Any]) -> Convention:
    """The convention for two models whose tokens are to be paired; the shorter context counts.

    Args:
        asked: arguments of `convention_of`.

    Raises:
        InvalidRequest: it names the argument.
        ValueError: tokens of the two are not the same.
    """
    if a.tokenizer.backend.to_str() != b.tokenizer.backend.to_str():
        raise ValueError(
            "compare: the models have different tokenizers, so that their tokens cannot be paired; score the texts "
            "with each, and compare bits per byte"
        )
    if a.tokenizer.vocab_size != b.tokenizer.vocab_size:
        sizes = f"{a.tokenizer.vocab_size} and {b.tokenizer.vocab_size}"
        raise ValueError(f"compare: the models have logits for {sizes} tokens, which have no divergence")
    context = min(a.context, b.context)
    found, other = (convention_of(side.tokenizer, context, **asked) for side in (a, b))
    if found != other:
        raise ValueError("compare: the models have different BOS or EOS tokens, so that their windows differ")
    return found


def compare_texts(
    a: Side, b: Side, convention: Convention, texts: Iterable[tuple[Source, str]], advance: Advance
) -> dict[str, Any]:
    """Metrics of both models over all texts, and of their comparison.

    Raises:
        UserError, ValueError: a text cannot be scored this way, or none has a token to score; the message names it.
    """
    comparison, corpora, sources = Comparison(), (Corpus(convention), Corpus(convention)), deque[Source]()
    context = min(a.context, b.context)
    every = tokenized(a.tokenizer, convention, texts, sources)
    found = (piece for text in every for piece in pieces(text, convention, context))
    todo, ahead = tee(found)
    work = ((piece.text.token_ids, piece.window) for piece in ahead if piece.window is not None)
    compared = compare_windows(a.model, b.model, work)
    for piece in todo:
        pairs = [] if piece.window is None else next(compared)
        try:
            comparison.add(pairs)
        except ValueError as error:
            raise EngineError(f"{piece.text.where}: {error}") from None
        advance(size_of(piece, sources[0]), len(pairs))
        for corpus, logprobs in zip(corpora, ([p.logprob_a for p in pairs], [p.logprob_b for p in pairs]), strict=True):
            corpus.add(piece, logprobs)
        if piece.is_last:
            sources.popleft()
    corpora[0].check()
    metrics_a, metrics_b = (corpus.tally.metrics(convention.method) for corpus in corpora)
    return {
        **asdict(convention),
        "num_texts": corpora[0].tally.num_texts,
        "a": metrics_a,
        "b": metrics_b,
        "comparison": comparison.metrics(),
    }
