"""Files scored in this process; answers are those of /v1/perplexity in lines."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from lpa_model.perplexity import Convention
from server.engine.request import Measures
from server.engine.tokenizer import Tokenizer
from server.llm import LLM
from server.scoring.perplexity import Corpus, Piece, Text, entries
from server.scoring.texts import Advance, OnTokens, Source
from server.scoring.units import TextUnits, Units, tokenize_units


def score_texts(
    llm: LLM,
    convention: Convention,
    texts: Iterable[tuple[Source, str]],
    advance: Advance,
    on_tokens: OnTokens | None = None,
    *,
    units: Units | None = None,
    digest: bool = False,
) -> Iterator[dict[str, Any]]:
    """The lines that a server of the model answers with, each text's with its "file" and "line".

    Raises:
        UserError, ValueError: a text cannot be scored this way, or none has a token to score; the message names it.
    """
    corpus, sources = Corpus(convention, llm.engine.identity if digest else None), deque[Source]()
    of_text = None if units is None else TextUnits(llm.tokenizer, units)
    with_offsets = on_tokens is not None or units is not None
    work = tokenized(llm.tokenizer, convention, texts, sources, units, with_offsets=with_offsets)
    mass_of = None if units is None else llm.tokenizer.word_beginnings
    measures = Measures(entropy=on_tokens is not None, mass_of=mass_of)
    for piece, scores in llm.score_pieces(work, convention, measures):
        found: dict[str, Any] = {}
        if of_text is not None:
            scores, found["units"] = of_text.add(piece, scores)
        if on_tokens is not None:
            on_tokens(sources[0], entries(llm.tokenizer, piece, scores))
        advance(size_of(piece, sources[0]), len(scores.logprobs))
        if (tally := corpus.add(piece, scores.logprobs)) is not None:
            yield {**sources.popleft().fields(), **corpus.text_fields(tally), **found}
    yield corpus.fields(llm.name, llm.engine.fingerprint)


def tokenized(
    tokenizer: Tokenizer,
    convention: Convention,
    texts: Iterable[tuple[Source, str]],
    sources: deque[Source],
    units: Units | None = None,
    *,
    with_offsets: bool = False,
) -> Iterator[Text]:
    """The texts, whose sources are appended to `sources`."""
    for source, text in texts:
        sources.append(source)
        yield tokenize_units(tokenizer, convention, str(source), text, units, with_offsets=with_offsets)


def size_of(piece: Piece, source: Source) -> float:
    """Bytes of its file that a piece takes the work on by."""
    total = len(piece.text.token_ids)
    return source.size * (piece.end - piece.start) / total if total else source.size
