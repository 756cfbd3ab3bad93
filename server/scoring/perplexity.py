"""Texts to windows, and the scores of windows to sums: one pipeline for the API, `LLM` and the command line.

It knows neither HTTP nor the engine: its caller has each window scored and adds the scores in order. What a
window is, and what sums come to, is in `lpa_model/perplexity.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from lpa_model.perplexity import Convention, Method, Tally, Window, adds_bos, own_tokens, resolve_convention, windows
from server.engine.fingerprint import Identity
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.errors import ContextLength, EngineError, InvalidRequest
from server.protocol.logprobs import offsets_of_ids
from server.protocol.perplexity import corpus_fields, text_fields, token_entries
from server.scoring.digest import Digest

PART = 1 << 16  # numbers


@dataclass(frozen=True)
class Text:
    """A tokenized text."""

    where: str  # its name in messages
    text: str  # decoded, if it came as token ids
    token_ids: Sequence[int]
    offsets: Sequence[int]  # characters at which tokens begin, if these are to be told
    counts: Tally  # its words and bytes; nothing is scored in it
    regions: Sequence[tuple[int, int]] | None = None  # (start, end) in characters, if it came divided


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `end` of a text: those that its window scores, and those around them that no window does.

    A text whose tokens cannot be scored is one piece without a window.
    """

    text: Text
    window: Window | None
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the text ends with it."""
        return self.end == len(self.text.token_ids)

    def sequence(self, *, beyond: bool = False) -> tuple[list[int], int]:
        """What its window gives the model, and where the first scored token stands in it.

        With `beyond`, the last window of a text has one token more, of no meaning, so that what may follow the text is
        measured, too: its scores are the last ones.
        """
        assert self.window is not None
        ids = self.window.tokens(self.text.token_ids)
        return [*ids, 0] if beyond and self.goes_beyond else ids, self.window.first_index

    @property
    def goes_beyond(self) -> bool:
        """Whether its window ends with the text."""
        return self.window is not None and self.window.end == len(self.text.token_ids)


def convention_of(
    tokenizer: Tokenizer,
    context: int,
    method: Method,
    max_length: int | None = None,
    stride: int | None = None,
    add_bos: bool | None = None,
) -> Convention:
    """`resolve_convention` with what the model says; `context` in tokens.

    Raises:
        InvalidRequest: it names the argument.
    """
    try:
        return resolve_convention(
            method,
            max_length,
            stride,
            add_bos,
            context=context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            adds_bos=adds_bos(tokenizer.backend, tokenizer.bos_token_id),
        )
    except ValueError as error:
        raise InvalidRequest(str(error), param=str(error).partition(":")[0]) from None


def tokenize(
    tokenizer: Tokenizer, convention: Convention, where: str, value: str | list[int], *, with_offsets: bool = False
) -> Text:
    """A text, or the one that token ids stand for.

    Raises:
        InvalidRequest: the model lacks a token.
    """
    offsets: list[int] = []
    if isinstance(value, str):
        text = value
        if with_offsets:
            given, offsets = tokenizer.encode_with_offsets(value, add_special_tokens=False)
        else:
            given = tokenizer.encode(value, add_special_tokens=False)
        tokenizer.check(given, where)
        ids = own_tokens(given, convention)
        offsets = offsets[len(given) - len(ids) :]
    else:
        tokenizer.check(value, where)
        ids = own_tokens(value, convention)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if with_offsets:
            offsets = offsets_of_ids(tokenizer, ids)
    counts = Tally()
    counts.count_text(text)
    return Text(where, text, _compact("i", ids), _compact("q", offsets), counts)


def _compact(kind: str, numbers: Sequence[int]) -> array[int]:
    """An array of a list, which may have millions of numbers; other threads run between its parts."""
    found = array(kind)
    for start in range(0, len(numbers), PART):
        found.extend(numbers[start : start + PART])
    return found


def pieces(text: Text, convention: Convention, context: int) -> Iterator[Piece]:
    """The pieces of a text in order, at least one; `context` is the model's, in tokens.

    Raises:
        ContextLength, InvalidRequest: the text has too many tokens for `full` or too few for `chunks`.
    """
    size = len(text.token_ids)
    try:
        cut = windows(size, convention)
    except ValueError as error:
        if convention.method == "full" and size >= context:
            raise ContextLength(f"{text.where}: {error}", context, param=text.where) from None
        raise InvalidRequest(f"{text.where}: {error}", param=text.where) from None
    start, window = 0, next(cut, None)
    while window is not None and (following := next(cut, None)) is not None:
        yield Piece(text, window, start, window.end)
        start, window = window.end, following
    yield Piece(text, window, start, size)


class Corpus:
    """Sums of texts whose pieces are added in order."""

    def __init__(self, convention: Convention, identity: Identity | None = None) -> None:
        """With an `identity`, `fields` have a digest."""
        self.convention = convention
        self._digest = None if identity is None else Digest(identity, convention)
        self.tally = Tally()
        self.prompt_tokens = 0
        self._text: Tally | None = None  # of the text that has begun

    def add(self, piece: Piece, logprobs: Sequence[float]) -> Tally | None:
        """Add the scored tokens of a piece; returns the sums of its text if that is complete.

        Raises:
            EngineError: one is not a finite number.
        """
        if self._digest is not None:
            self._digest.add(None if self._text is not None else piece.text.token_ids, logprobs)
        tally = self._text = self._text or copy(piece.text.counts)
        try:
            tally.add_logprobs(logprobs)
        except ValueError as error:
            raise EngineError(f"{piece.text.where}: {error}") from None
        if not piece.is_last:
            return None
        self._text = None
        self.tally.add_text(tally)
        self.prompt_tokens += len(piece.text.token_ids)
        return tally

    def text_fields(self, tally: Tally) -> dict[str, Any]:
        """An answer's entry of the text that was completed last."""
        return text_fields(self.tally.num_texts - 1, tally, self.convention.method)

    def fields(self, model: str, fingerprint: str) -> dict[str, Any]:
        """The answer without its entries. Raises what `check` raises."""
        self.check()
        digest = {} if self._digest is None else {"digest": self._digest.digits()}
        found = corpus_fields(model, fingerprint, self.convention, self.tally, self.prompt_tokens)
        return {**found, **digest}

    @property
    def digest(self) -> str:
        """Of what was added; needs an identity."""
        assert self._digest is not None
        return self._digest.digits()

    def check(self, field: str = "input") -> None:
        """Raises InvalidRequest that names `field` if no token of any text was scored."""
        if not self.tally.num_tokens:
            why = "" if self.convention.add_bos else "; without BOS the first token of a text is not scored"
            raise InvalidRequest(f"{field}: has no token to score{why}", param=field)


def entries(tokenizer: Tokenizer, piece: Piece, scores: Logprobs) -> list[dict[str, Any]]:
    """What an answer says of a piece's tokens, whose text must have offsets; what is not scored has no numbers."""
    found: list[dict[str, Any]] = []
    for start, end, of_run in runs(piece, scores):
        ids, offsets = piece.text.token_ids[start:end], piece.text.offsets[start:end]
        found += token_entries(tokenizer, ids, offsets, of_run)
    return found


def runs(piece: Piece, scores: Logprobs) -> Iterator[tuple[int, int, Logprobs | None]]:
    """(first token, the one after the last, scores) of a piece's runs of tokens; None where they are not scored."""
    if piece.window is None:
        yield piece.start, piece.end, None
    else:
        first, end = piece.window.first_scored, piece.window.end
        yield piece.start, first, None
        yield first, end, scores
        yield end, piece.end, None
