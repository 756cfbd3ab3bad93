"""Texts scored in this process, with one model or two side by side; answers are those of /v1/perplexity in lines."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import tee
from typing import Any, TypeVar

import torch

from lpa_model.backends.torch.sampling import score
from lpa_model.compare import Comparison, measure_pairs
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Convention, Tally, Window, own_tokens, windows
from lpa_model.scoring import measure_windows
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.protocol.perplexity import corpus_fields, text_fields, token_entries
from server.scoring.texts import Advance, OnTokens, Place

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A window of a text, None for the only piece of a text with nothing to score."""

    place: Place
    text: str
    ids: Sequence[int]
    offsets: Sequence[int]  # the characters at which tokens begin, if tokens are to be told
    window: Window | None
    is_last: bool  # of its text
    size: float  # bytes of its file that it takes the work on by


def score_texts(
    model: LPAForCausalLM,
    tokenizer: Tokenizer,
    convention: Convention,
    texts: Iterable[tuple[Place, str]],
    name: str,
    fingerprint: str,
    advance: Advance,
    on_tokens: OnTokens | None = None,
) -> Iterator[dict[str, Any]]:
    """The lines that a server of the model `name` answers with, each text's with its "file" and "line".

    Raises:
        ValueError: a text cannot be scored this way, or none has a token to score; the message names the text.
    """
    corpus, tally, prompt_tokens = Tally(), Tally(), 0
    pieces = _pieces(tokenizer, convention, texts, with_offsets=on_tokens is not None)
    tokens = None
    for piece, found in _measure([model], pieces, _scores):
        _add(tally.add_logprobs, [logprob for logprob, _ in found], piece)
        if on_tokens is not None:
            tokens = tokens or _TokenRuns(tokenizer)
            on_tokens(piece.place, tokens.take(piece, found))
        advance(piece.size, len(found))
        if not piece.is_last:
            continue
        tally.count_text(piece.text)
        yield {**piece.place.fields(), **text_fields(corpus.num_texts, tally, convention.method)}
        corpus.add_text(tally)
        prompt_tokens += len(piece.ids)
        tally, tokens = Tally(), None
    _check_scored(corpus, convention)
    yield corpus_fields(name, fingerprint, convention, corpus, prompt_tokens)


def compare_texts(
    models: tuple[LPAForCausalLM, LPAForCausalLM],
    tokenizer: Tokenizer,
    convention: Convention,
    texts: Iterable[tuple[Place, str]],
    advance: Advance,
) -> dict[str, Any]:
    """Metrics of both models over all texts, and of their comparison.

    Raises:
        ValueError: as `score_texts`.
    """
    comparison, corpora, tallies = Comparison(), (Tally(), Tally()), (Tally(), Tally())
    for piece, pairs in _measure(models, _pieces(tokenizer, convention, texts), measure_pairs):
        _add(comparison.add, pairs, piece)
        tallies[0].add_logprobs([pair.logprob_a for pair in pairs])
        tallies[1].add_logprobs([pair.logprob_b for pair in pairs])
        advance(piece.size, len(pairs))
        if piece.is_last:
            for corpus, tally in zip(corpora, tallies, strict=True):
                tally.count_text(piece.text)
                corpus.add_text(tally)
            tallies = (Tally(), Tally())
    _check_scored(corpora[0], convention)
    a, b = (corpus.metrics(convention.method) for corpus in corpora)
    return {**asdict(convention), "num_texts": corpora[0].num_texts, "a": a, "b": b, "comparison": comparison.metrics()}


class _TokenRuns:
    """The entries of a text's tokens, in the order of its pieces; what is not scored has null for its numbers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._done = 0

    def take(self, piece: Piece, found: list[tuple[float, int]]) -> list[dict[str, Any]]:
        """Entries of the tokens up to the end of the piece."""
        entries: list[dict[str, Any]] = []
        if piece.window is not None:
            entries += self._run(piece, piece.window.first_scored, None)
            none: list[list[Any]] = [[]] * len(found)  # no alternatives
            scores = Logprobs([logprob for logprob, _ in found], [rank for _, rank in found], none, none)
            entries += self._run(piece, piece.window.end, scores)
        if piece.is_last:
            entries += self._run(piece, len(piece.ids), None)
        return entries

    def _run(self, piece: Piece, end: int, scores: Logprobs | None) -> list[dict[str, Any]]:
        ids, offsets = piece.ids[self._done : end], piece.offsets[self._done : end]
        self._done = end
        return token_entries(self._tokenizer, ids, offsets, scores)


def _pieces(
    tokenizer: Tokenizer, convention: Convention, texts: Iterable[tuple[Place, str]], *, with_offsets: bool = False
) -> Iterator[Piece]:
    for place, text in texts:
        if with_offsets:
            given, begins = tokenizer.encode_with_offsets(text, add_special_tokens=False)
        else:
            given, begins = tokenizer.encode(text, add_special_tokens=False), []
        tokenizer.check(given, str(place))
        own = own_tokens(given, convention)
        ids, offsets = array("i", own), array("q", begins[len(given) - len(own) :])
        try:
            cut = windows(len(ids), convention)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        done, held = 0, next(cut, None)
        while True:
            following = next(cut, None)
            end = len(ids) if held is None or following is None else held.end
            size = place.size * (end - done) / len(ids) if ids else place.size
            yield Piece(place, text, ids, offsets, held, following is None, size)
            if following is None:
                break
            done, held = end, following


def _measure(
    models: Sequence[LPAForCausalLM], pieces: Iterator[Piece], measure: Callable[..., list[T]]
) -> Iterator[tuple[Piece, list[T]]]:
    """Each piece with what `measure` finds at its scored tokens, none for a piece without a window."""
    pieces, ahead = tee(pieces)
    work = ((piece.ids, piece.window) for piece in ahead if piece.window is not None)
    measured = measure_windows(models, work, measure)
    for piece in pieces:
        yield piece, [] if piece.window is None else next(measured)[1]


def _scores(targets: torch.Tensor, logits: torch.Tensor) -> list[tuple[float, int]]:
    """(log-probability, rank) of each, as the server's."""
    found = score(logits, targets, 0)
    return list(zip(found.logprobs, found.ranks, strict=True))


def _add(add: Callable[[list[T]], None], found: list[T], piece: Piece) -> None:
    try:
        add(found)
    except ValueError as error:
        raise ValueError(f"{piece.place}: {error}") from None


def _check_scored(corpus: Tally, convention: Convention) -> None:
    if not corpus.num_tokens:
        why = "" if convention.add_bos else "; without BOS the first token of a text is not scored"
        raise ValueError(f"input: has no token to score{why}")
