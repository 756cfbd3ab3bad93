"""What a step costs, learned from the steps that ran, and how much of the next one prompts may take. No tensors.

A step takes the time of its decodes and, on top, that of its prompt work: so much for there being any, so much a token,
so much for every token of cached context that a chunk attends to, and so much for every row that is scored.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

import numpy as np

from server.engine.request import Request

PAIRS = 256  # tokens of a chunk whose look at the context costs as much as rebuilding its keys and values
MIN_CHUNK = 8  # tokens; so few cost what one does
SMALL = 256  # tokens; a step with fewer and no decodes takes longer than they cost, for it reads all weights
NOISE = 0.1  # standard deviation of a step's time around its expectation, relative
DRIFT = 0.03  # of a rate from step to step, relative
OUTLIER = 0.5  # relative error is clipped to this
DECODE_SAMPLES = 5  # decode-only steps whose median is a decode's time


class Work(NamedTuple):
    """Prompt work of a step: its tokens, cached tokens looked back on (weighted: `work_of`), rows scored; 1 pass."""

    tokens: float = 0.0
    context: float = 0.0
    scored: float = 0.0
    passes: float = 0.0


FIRST_RATES = Work(1.0, 1 / 8, 1.0, 8.0)  # relative; where learning begins
LEAST = 0.05  # of that relation to a token's rate


def work_of(request: Request, computed: int, num_tokens: int) -> Work:
    """The work of `num_tokens` prompt tokens of a request after `computed` ones, in a pass that others share."""
    return Work(num_tokens, computed * (1 + num_tokens / PAIRS), request.num_scored(computed, num_tokens))


class StepCost:
    """Running estimates: the time of a decode-only step, and milliseconds per unit of each kind of `Work`."""

    def __init__(self) -> None:
        self.rates: Work | None = None
        self._covariance = np.zeros((4, 4))  # of the rates
        self._decode_ms: deque[float] = deque(maxlen=DECODE_SAMPLES)
        self._num_decodes = 0  # of the steps in _decode_ms, within a quarter
        self._steps_with_prompts = 2  # since the last decode-only one; 2: the first step with decodes is a probe

    def decode_ms(self, num_decodes: int) -> float:
        """Time of a step of so many decodes alone, rather too short than too long; infinite if none was ever seen."""
        if not self._decode_ms:
            return math.inf
        return median(self._decode_ms) * min(1.0, num_decodes / self._num_decodes)

    def work_ms(self, work: Work) -> float:
        """Time that prompt work adds; 0 as long as nothing is known."""
        return 0.0 if self.rates is None else sum(rate * x for rate, x in zip(self.rates, work, strict=True))

    @property
    def pass_ms(self) -> float:
        """Time that any prompt work at all adds."""
        return self.work_ms(Work(passes=1))

    def probe_due(self, num_decodes: int) -> bool:
        """Whether the next step should be decodes alone, to know their time; never true twice in a row.

        Where prompts keep coming no step would show it otherwise: now and then one is kept free of them.
        """
        self._steps_with_prompts += 1
        known = self._like_the_known(num_decodes)
        due = self._steps_with_prompts > (4 * len(self._decode_ms) if known else 1)
        if due:
            self._steps_with_prompts = 0
        return due

    def observe(self, num_decodes: int, work: Work, elapsed_ms: float) -> None:
        """Learn from a step that ran."""
        if not work.tokens:
            if num_decodes:
                if not self._like_the_known(num_decodes):
                    self._decode_ms.clear()
                    self._num_decodes = num_decodes
                self._decode_ms.append(elapsed_ms)
                self._steps_with_prompts = 0
            return
        if num_decodes and not self._like_the_known(num_decodes):
            return
        decode_ms = self.decode_ms(num_decodes) if num_decodes else 0.0
        if self.rates is None:
            relative = sum(rate * x for rate, x in zip(FIRST_RATES, work, strict=True))
            scale = max(elapsed_ms - decode_ms, 0.1 * elapsed_ms) / relative
            self.rates = Work(*(scale * rate for rate in FIRST_RATES))
            self._covariance = np.diag(np.square(self.rates))
        elif num_decodes or work.tokens >= SMALL:
            self._correct(work, elapsed_ms, decode_ms + self.work_ms(work))

    def _correct(self, work: Work, elapsed_ms: float, expected_ms: float) -> None:
        """A step of a Kalman filter whose state is the rates and whose measurement is the relative error."""
        assert self.rates is not None
        rates, part = np.array(self.rates), np.array(work) / expected_ms
        error = min(max(elapsed_ms / expected_ms - 1, -OUTLIER), OUTLIER)
        gain = self._covariance @ part / (part @ self._covariance @ part + NOISE**2)
        self._covariance -= np.outer(gain, part @ self._covariance)
        rates = np.maximum(rates + gain * error, 0.1 * rates)
        rates = np.maximum(rates, LEAST * rates[0] * np.array(FIRST_RATES))  # a rate near 0 would never rise again
        drift = np.where(self._covariance.diagonal() < rates**2, (DRIFT * rates) ** 2, 0.0)
        self._covariance += np.diag(drift)
        self.rates = Work(*rates.tolist())

    def _like_the_known(self, num_decodes: int) -> bool:
        return abs(num_decodes - self._num_decodes) <= self._num_decodes / 4


class PromptShare:
    """Milliseconds that one kind of work has earned, a share of every step's decodes at a time.

    It is spent when it is worth a pass: at least half of the time that the work adds to a step then goes into tokens.
    More than one step's share is saved up for two steps at most, however expensive a pass is estimated to be.
    """

    def __init__(self) -> None:
        self._saved = 0.0

    def earn(self, ms: float, pass_ms: float, most: float) -> float:
        """What there is for tokens now, 0 if that is not worth a pass; no step takes more than `most` for all."""
        worth = min(2 * pass_ms, ms * 4 / 3, most)
        self._saved = min(self._saved + (ms if ms >= worth else ms * 2 / 3), max(worth, ms), most)
        return max(self._saved - pass_ms, self._saved / 2) if self._saved >= worth else 0.0

    def spend(self) -> None:
        """A step has taken it."""
        self._saved = 0.0


class PromptBudget:
    """What prompt and scoring work may still take of one step: tokens, milliseconds, milliseconds of scoring."""

    def __init__(self, cost: StepCost, tokens: int, total_ms: float = math.inf, scoring_ms: float = math.inf) -> None:
        self.tokens = tokens
        # of requests for which something is left: is_scoring
        self.open_kinds = {kind for kind, ms in ((False, total_ms), (True, min(total_ms, scoring_ms))) if tokens and ms}
        self._cost = cost
        self._whole_tokens, self._whole_ms = tokens, {False: total_ms, True: min(total_ms, scoring_ms)}
        self._left_ms = {False: total_ms, True: scoring_ms}  # scoring counts as both
        self._begun = {False: False, True: False}

    def affordable(self, request: Request, computed: int, end: int) -> int:
        """Tokens of a request from `computed` to `end` that fit now; 0 closes the budget to its kind.

        The first request of a step always gets some, and so does the first prompt: scoring cannot keep it out. One
        that has not begun and would get only the little that is left, but fits the next step whole, is left to it:
        texts of one length then keep one shape.
        """
        scoring, asked = request.is_scoring, end - computed
        fixed = self._cost.work_ms(work_of(request, computed, 0))
        variable = max(self._cost.work_ms(work_of(request, computed, asked)) - fixed, 0.0)
        left_ms, whole_ms = min(self._left_ms[False], self._left_ms[scoring]), self._whole_ms[scoring]
        fits = asked if fixed + variable <= left_ms else max(0, int((left_ms - fixed) / variable * asked))
        tokens = min(fits, self.tokens)
        if not any(self._begun.values()) or not (scoring or self._begun[False]):
            tokens = max(tokens, min(MIN_CHUNK, asked, self.tokens))
        elif tokens < asked <= self._whole_tokens and fixed + variable <= whole_ms and not request.block_table:
            scarce = 4 * left_ms < whole_ms if tokens == fits else 4 * self.tokens < self._whole_tokens
            tokens = 0 if scarce else tokens
        if not tokens:
            self._close(scoring)
        return tokens

    def spend(self, request: Request, computed: int, num_tokens: int) -> None:
        """Take the tokens and their time out of the budget."""
        ms = self._cost.work_ms(work_of(request, computed, num_tokens))
        scoring = request.is_scoring
        self._begun[scoring] = True
        self.tokens -= num_tokens
        self._left_ms[False] -= ms
        if scoring:
            self._left_ms[True] -= ms
        if not self.tokens:
            self.open_kinds.clear()
        elif min(self._left_ms.values()) <= 0:
            self._close(self._left_ms[False] > 0 or not self._begun[False])

    def _close(self, scoring_only: bool) -> None:
        self.open_kinds -= {True} if scoring_only else {False, True}
