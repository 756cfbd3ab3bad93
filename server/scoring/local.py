"""Files scored in this process; answers are those of /v1/perplexity in lines."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from lpa_model.perplexity import Convention
from server.engine.tokenizer import Tokenizer
from server.llm import LLM
from server.scoring.perplexity import Corpus, Piece, Text, entries, tokenize
from server.scoring.texts import Advance, OnTokens, Source


def score_texts(
    llm: LLM,
    convention: Convention,
    texts: Iterable[tuple[Source, str]],
    advance: Advance,
    on_tokens: OnTokens | None = None,
) -> Iterator[dict[str, Any]]:
    """The lines that a server of the model answers with, each text's with its "file" and "line".

    Raises:
        UserError, ValueError: a text cannot be scored this way, or none has a token to score; the message names it.
    """
    corpus, sources = Corpus(convention), deque[Source]()
    work = tokenized(llm.tokenizer, convention, texts, sources, with_offsets=on_tokens is not None)
    for piece, scores in llm.score_pieces(work, convention):
        if on_tokens is not None:
            on_tokens(sources[0], entries(llm.tokenizer, piece, scores))
        advance(size_of(piece, sources[0]), len(scores.logprobs))
        if (tally := corpus.add(piece, scores.logprobs)) is not None:
            yield {**sources.popleft().fields(), **corpus.text_fields(tally)}
    yield corpus.fields(llm.name, llm.engine.fingerprint)


def tokenized(
    tokenizer: Tokenizer,
    convention: Convention,
    texts: Iterable[tuple[Source, str]],
    sources: deque[Source],
    *,
    with_offsets: bool = False,
) -> Iterator[Text]:
    """The texts, whose sources are appended to `sources`."""
    for source, text in texts:
        sources.append(source)
        yield tokenize(tokenizer, convention, str(source), text, with_offsets=with_offsets)


def size_of(piece: Piece, source: Source) -> float:
    """Bytes of its file that a piece takes the work on by."""
    total = len(piece.text.token_ids)
    return source.size * (piece.end - piece.start) / total if total else source.size
