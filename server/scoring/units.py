"""Surprisal of words and of regions: the tokens that each has, and what their log-probabilities come to, in bits.

A token that begins with a space says that a word has ended before it. Without a correction, a word's probability has in
it that the word before it had ended, and lacks that it ends itself. With the correction the space belongs to the word
before it. With B the tokens that begin with a space,

    log p(word) = sum of its tokens' log p - log p(B | what is before it) + log p(B | what is before it, word),

where the first correction is made if the word's first token is in B and is not the first of its text, and the second if
the token after the word is in B or the text has ended.

Pimentel and Meister, "How to compute the probability of a word" (2024). Oh and Schuler, "Leading whitespaces of
language models' subword vocabulary pose a confound for calculating word probabilities" (2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from lpa_model.perplexity import Convention
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.protocol.perplexity import UnitName
from server.scoring.perplexity import Piece, Text, runs, tokenize

WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Units:
    """Into what texts are divided.

    A region is what stands before, between or after separators, which are no part of the text.

    Raises:
        InvalidRequest: there is no such unit, or the separator is empty.
    """

    name: UnitName
    correction: bool = True
    separator: str = "|"

    def __post_init__(self) -> None:
        if self.name not in get_args(UnitName):
            raise InvalidRequest(f"unit: {self.name!r} is neither 'word' nor 'region'", param="unit")
        if not self.separator:
            raise InvalidRequest("region_separator: is empty", param="region_separator")

    def divide(self, value: str | list[int], where: str) -> tuple[str | list[int], list[tuple[int, int]] | None]:
        """The text without separators, and the (start, end) of its regions; None where its words are to be found.

        Raises:
            InvalidRequest: regions of token ids.
        """
        if self.name == "word":
            return value, None
        if not isinstance(value, str):
            raise InvalidRequest(f"{where}: unit 'region' needs a text with separators, not token ids", param=where)
        parts = value.split(self.separator)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return "".join(parts), list(zip([0, *ends], ends, strict=False))


@dataclass
class TextUnits:
    """The units of one text, once `add` has had all its pieces in order."""

    tokenizer: Tokenizer
    units: Units
    _logprobs: list[float | None] = field(default_factory=list)
    _masses: list[float] = field(default_factory=list)

    def add(self, piece: Piece, scores: Logprobs) -> tuple[Logprobs, list[dict[str, Any]]]:
        """Take a piece's scores, with masses of `Tokenizer.word_beginnings`, from `Piece.sequence` with what is beyond.

        Returns the scores without that, and after the last piece of a text the entries of an answer.
        """
        after = math.nan
        if piece.goes_beyond:
            after, end = scores.masses[-1], len(scores.logprobs) - 1
            scores = scores.part(0, end, len(scores.top_ids[0]))
        for start, end, of_run in runs(piece, scores):
            self._logprobs += [None] * (end - start) if of_run is None else of_run.logprobs
            self._masses += [math.nan] * (end - start) if of_run is None else of_run.masses
        if not piece.is_last:
            return scores, []
        text, spans = piece.text.text, piece.text.regions
        if spans is None:
            spans = [found.span() for found in WORD.finditer(text)]
        entries = list(self._entries(piece.text, spans, after))
        self._logprobs, self._masses = [], []
        return scores, entries

    def _entries(self, text: Text, spans: Sequence[tuple[int, int]], after: float) -> Iterator[dict[str, Any]]:
        begins = np.isin(np.asarray(text.token_ids), self.tokenizer.word_beginnings)
        cuts = token_cuts(text, spans) if spans else []
        size = len(text.token_ids)
        for (start, end), first, last in zip(spans, cuts, [*cuts[1:], size], strict=False):
            surprisal = None
            values = self._logprobs[first:last]
            if None not in values:
                total = math.fsum(value for value in values if value is not None)
                if self.units.correction and first < last:
                    total -= self._masses[first] if first and begins[first] else 0.0
                    if last == size:
                        total += after
                    elif begins[last]:
                        total += self._masses[last]
                surprisal = 0.0 - total / math.log(2)  # never -0.0
            yield {
                "text": text.text[start:end],
                "offset": start,
                "num_tokens": last - first,
                "surprisal": surprisal if surprisal is None or math.isfinite(surprisal) else None,
            }


def tokenize_units(
    tokenizer: Tokenizer,
    convention: Convention,
    where: str,
    value: str | list[int],
    units: Units | None,
    *,
    with_offsets: bool,
) -> Text:
    """`tokenize` for a text with or without units, whose tokens must have offsets. Raises what both raise."""
    regions = None
    if units is not None:
        value, regions = units.divide(value, where)
    return replace(tokenize(tokenizer, convention, where, value, with_offsets=with_offsets), regions=regions)


def token_cuts(text: Text, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The first token of each unit. A token belongs to the unit that has its first character which is no white space;
    one of white space alone to the unit after it, behind the last unit to that."""
    characters, size = text.text, len(text.token_ids)
    cuts, token = [0], 0
    for start, _ in spans[1:]:
        # characters of white space before the unit are its own, as the space before a word is
        begin = start
        while begin > 0 and characters[begin - 1].isspace():
            begin -= 1
        while token < size and _first_seen(text, token) < begin:
            token += 1
        cuts.append(token)
    return cuts


def _first_seen(text: Text, token: int) -> int:
    """Where a token's first character that is no white space stands, or else its first."""
    begin = text.offsets[token]
    end = text.offsets[token + 1] if token + 1 < len(text.token_ids) else len(text.text)
    at = begin
    while at < end and text.text[at].isspace():
        at += 1
    return at if at < end else begin
