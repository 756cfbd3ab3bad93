"""What sampling remembers of a request from one token to the next: built once, then kept up token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from lpa_model.backends.base import SamplingRow, uniform
from server.engine.request import Request


class SamplingState:
    """A request's constraints as arrays, and the tokens that its penalties look at.

    It follows `request.token_ids`, which only grows: preemption and recomputation change nothing. It holds no
    reference to the request, so that it can be kept for as long as the request lives.
    """

    def __init__(self, request: Request, eos_token_ids: Sequence[int]) -> None:
        params = request.params
        self._allowed = None
        if params.allowed_token_ids is not None:
            self._allowed = np.array(params.allowed_token_ids, np.int64)
        self._bias_ids = self._bias = None
        if params.logit_bias:
            self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
            self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._ends = [*eos_token_ids, *params.stop_token_ids]
        self._banned = [words[0] for words in params.bad_words if len(words) == 1]
        self._bad_ends: dict[int, list[tuple[list[int], int]]] = {}  # by the token before the last
        for *prefix, last in params.bad_words:
            if prefix:
                self._bad_ends.setdefault(prefix[-1], []).append((prefix, last))
        repeats = params.repetition_penalty != 1
        self._penalizes = repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._places: dict[int, int] = {}  # of token ids in the arrays
        self._followed = request.num_prompt_tokens
        size = params.max_tokens if self._penalizes else 0
        if repeats:
            prompt = dict.fromkeys(request.token_ids[: request.num_prompt_tokens])
            self._places = {token: place for place, token in enumerate(prompt)}
            size += len(prompt)
        self._seen = np.zeros(size, np.int64)
        self._seen[: len(self._places)] = list(self._places)
        self._counts = np.zeros(size, np.float32)
        self._row, self._other = (
            SamplingRow(
                row=0,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                frequency_penalty=params.frequency_penalty,
                presence_penalty=params.presence_penalty,
                logprobs=params.logprobs,
                constrained=params.grammar is not None,
                allowed=self._allowed,
                bias_ids=self._bias_ids,
                bias=self._bias,
            )
            for _ in range(2)
        )
        self._never_bans = not (self._banned or self._bad_ends or (self._ends and params.min_tokens))

    def row(self, request: Request, row: int) -> SamplingRow:
        """How the token after row `row` of a batch is sampled. Its arrays change with the next call, and itself with
        the one after that: until then its step is collected."""
        found, self._other = self._other, self._row
        self._row = found
        found.row = row
        found.draws = partial(uniform, request.seed, request.choice, request.num_tokens)
        if not self._never_bans:
            found.banned = self._bans(request)
        if self._penalizes:
            self._follow(request)
            used = len(self._places)
            found.seen = self._seen[:used] if used else None
            found.counts = self._counts[:used] if used else None
        return found

    def _follow(self, request: Request) -> None:
        """Count the tokens that were generated since the last call."""
        for token in request.token_ids[self._followed :]:
            place = self._places.setdefault(token, len(self._places))
            self._seen[place] = token
            self._counts[place] += 1
        self._followed = len(request.token_ids)

    def _bans(self, request: Request) -> list[int]:
        banned = list(self._banned)
        generated = request.num_generated
        if generated < request.params.min_tokens:
            banned += self._ends
        for prefix, last in self._bad_ends.get(request.token_ids[-1], ()):
            if len(prefix) <= generated and request.token_ids[-len(prefix) :] == prefix:
                banned.append(last)
        return banned
