"""Continuations after their contexts: how both are tokenized, and which of them share a sequence.

One pipeline for the API and `LLM`; it knows neither HTTP nor the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lpa_model.perplexity import adds_bos
from server.engine.request import Logprobs
from server.engine.tokenizer import Tokenizer
from server.errors import ContextLength, InvalidRequest
from server.protocol.loglikelihood import Alternative


@dataclass(frozen=True)
class Pair:
    """A tokenized alternative; it is number `index` of its set."""

    where: str
    index: int
    context: list[int]
    continuation: list[int]
    num_bytes: int  # of the continuation, as it was given


@dataclass(frozen=True)
class Unscorable:
    """An alternative that cannot be scored."""

    index: int
    error: InvalidRequest


class PairTokenizer:
    """Tokens of contexts and continuations, split as lm-evaluation-harness does.

    White space at the end of a context goes to its continuation; both are tokenized as one text, which is cut after as
    many tokens as the context has alone. Where one of the two came as token ids, each is taken by itself. Before an
    empty context stands BOS, or EOS where the model has no BOS, unless the continuation begins with it.

    Args:
        max_tokens: the longest context and continuation together.
        add_bos: whether BOS stands before a context (None: the tokenizer's own setting).

    Raises:
        InvalidRequest: add_bos is true and the model has no BOS.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, add_bos: bool | None) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._bos = tokenizer.bos_token_id
        self._prefix = tokenizer.eos_token_id if self._bos is None else self._bos
        self.add_bos = adds_bos(tokenizer.backend, self._bos) if add_bos is None else add_bos
        if self.add_bos and self._bos is None:
            raise InvalidRequest("add_bos: the model has no BOS token", param="add_bos")

    def __call__(self, alternatives: Sequence[Alternative]) -> list[Pair | Unscorable]:
        """A set's pairs.

        Raises:
            InvalidRequest: the model lacks a token.
        """
        contexts: dict[str, list[int]] = {}
        return [self._pair(i, alternative, contexts) for i, alternative in enumerate(alternatives)]

    def _pair(self, index: int, asked: Alternative, contexts: dict[str, list[int]]) -> Pair | Unscorable:
        where = asked.where
        if not asked.continuation:
            return Unscorable(index, InvalidRequest(f"{where}: is empty; there is nothing to score", param=where))
        if isinstance(asked.context, str) and isinstance(asked.continuation, str):
            bare = asked.context.rstrip()
            if bare not in contexts:
                contexts[bare] = self._ids(bare, where)
            context = contexts[bare]
            continuation = self._ids(asked.context + asked.continuation, where)[len(context) :]
        else:
            context, continuation = self._ids(asked.context, where), self._ids(asked.continuation, where)
        if not context:
            if self._prefix is None:
                reason = f"{where}: its context is empty and the model has no BOS or EOS"
                return Unscorable(index, InvalidRequest(reason, param=where))
            if continuation[:1] == [self._prefix]:
                context, continuation = continuation[:1], continuation[1:]
            else:
                context = [self._prefix]
        elif self.add_bos and self._bos is not None and context[0] != self._bos:
            context = [self._bos, *context]
        if not continuation:
            reason = f"{where}: has no token of its own after its context"
            return Unscorable(index, InvalidRequest(reason, param=where))
        total = len(context) + len(continuation)
        if total > self.max_tokens:
            too_long = ContextLength(f"{where}: has {total} tokens with its context", self.max_tokens, param=where)
            return Unscorable(index, too_long)
        return Pair(where, index, context, continuation, self._num_bytes(asked.continuation))

    def _ids(self, value: str | list[int], where: str) -> list[int]:
        ids = self._tokenizer.encode(value, add_special_tokens=False) if isinstance(value, str) else value
        self._tokenizer.check(ids, where)
        return ids

    def _num_bytes(self, value: str | list[int]) -> int:
        return (
            len(value.encode()) if isinstance(value, str) else sum(len(self._tokenizer.token_bytes(i)) for i in value)
        )


@dataclass(frozen=True)
class Pack:
    """Pairs of one context in one sequence, in which each continuation sees only the context and itself.

    `branches` are where the continuations begin, as of `Request`.
    """

    pairs: list[Pair]
    token_ids: list[int]
    branches: tuple[int, ...]

    def scores(self, found: Logprobs) -> Iterator[tuple[Pair, Logprobs]]:
        """Each pair with log-probabilities and ranks of its continuation, from those of the sequence."""
        at = len(self.pairs)  # the first tokens of all continuations come first
        for i, pair in enumerate(self.pairs):
            end = at + len(pair.continuation) - 1
            logprobs = [found.logprobs[i], *found.logprobs[at:end]]
            yield pair, Logprobs(logprobs, [found.ranks[i], *found.ranks[at:end]])
            at = end


def packs(pairs: Iterable[Pair], max_tokens: int) -> Iterator[Pack]:
    """The pairs of a set in packs: continuations of one context, as many as fit behind it together."""
    waiting: dict[tuple[int, ...], tuple[list[Pair], int]] = {}  # and the tokens that still fit
    for pair in pairs:
        context = tuple(pair.context)
        same, free = waiting.get(context, ([], max_tokens - len(context)))
        if len(pair.continuation) > free:
            yield _pack(same)
            same, free = [], max_tokens - len(context)
        same.append(pair)
        waiting[context] = same, free - len(pair.continuation)
    yield from (_pack(same) for same, _ in waiting.values())


def _pack(pairs: list[Pair]) -> Pack:
    token_ids, branches = list(pairs[0].context), []
    for pair in pairs:
        branches.append(len(token_ids))
        token_ids += pair.continuation
    return Pack(pairs, token_ids, tuple(branches))
