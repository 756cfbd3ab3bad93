"""Two models at the same tokens: how far apart their predictions are. No HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import torch

from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Tally, Window

LOGIT_ROWS = 256  # rows of logits held at a time: the vocabulary times this, in float32, is the peak of a comparison
TOKEN_BUDGET = 2048  # tokens of one forward pass, a single longer window excepted
LOOK_AHEAD = 16  # token budgets of windows that are sorted by length before they are computed

Work = tuple[Sequence[int], Window]
"""A text's ids and a window of it."""


class Pair(NamedTuple):
    """Predictions of models A and B at one scored token."""

    logprob_a: float
    logprob_b: float
    kl: float  # KL(A || B) of their distributions there, nats
    same_top: bool  # whether both hold the same token for the most probable


def compare_windows(a: LPAForCausalLM, b: LPAForCausalLM, work: Iterable[Work]) -> Iterator[list[Pair]]:
    """The pairs of each window's scored tokens, in order. The models are on one device.

    The windows may be of many texts. Some `LOOK_AHEAD` budgets of them are read before the first is computed, so that
    windows of equal length share forward passes.
    """
    group: list[Work] = []
    tokens = 0
    for item in work:
        group.append(item)
        tokens += item[1].length
        if tokens >= LOOK_AHEAD * TOKEN_BUDGET:
            yield from _compare_group(a, b, group)
            group, tokens = [], 0
    yield from _compare_group(a, b, group)


def _compare_group(a: LPAForCausalLM, b: LPAForCausalLM, group: list[Work]) -> list[list[Pair]]:
    found: list[list[Pair]] = [[] for _ in group]
    by_length = sorted(range(len(group)), key=lambda i: group[i][1].length)
    for length, same in groupby(by_length, key=lambda i: group[i][1].length):
        members = list(same)
        rows = max(1, TOKEN_BUDGET // length)
        for at in range(0, len(members), rows):
            batch = members[at : at + rows]
            for i, pairs in zip(batch, _compare_batch((a, b), [group[i] for i in batch]), strict=True):
                found[i] = pairs
    return found


@torch.inference_mode()
def _compare_batch(models: Sequence[LPAForCausalLM], batch: list[Work]) -> list[list[Pair]]:
    """Windows of one length through one forward pass of each model."""
    device = models[0].embed_tokens.weight.device
    tokens = torch.tensor([window.tokens(ids) for ids, window in batch], dtype=torch.int64, device=device)
    firsts = [window.first_index for _, window in batch]
    targets = torch.cat([row[first:] for row, first in zip(tokens, firsts, strict=True)])
    states = []
    for model in models:
        hidden = model(tokens[:, :-1])  # [windows, length - 1, d]: the last token predicts nothing that is asked
        states.append(torch.cat([row[first - 1 :] for row, first in zip(hidden, firsts, strict=True)]))
    pairs: list[Pair] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        a, b = (model.logits(state[rows]) for model, state in zip(models, states, strict=True))
        pairs += measure_pairs(targets[rows], a, b)
    each = iter(pairs)
    return [list(islice(each, window.num_scored)) for _, window in batch]


def measure_pairs(targets: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[Pair]:
    """Of target ids int64 [rows] and both models' float32 logits [rows, vocab].

    Computed in float64: the divergence of models that are nearly alike is a small sum of large terms.
    """
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    same = a.argmax(-1) == b.argmax(-1)
    own = [log.gather(1, targets[:, None])[:, 0] for log in (log_a, log_b)]
    return [Pair(*row) for row in zip(*(column.tolist() for column in (*own, kl, same)), strict=True)]


class Comparison:
    """Adds up pairs, without rounding: the order does not matter."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._num_same = 0
        self._differences = Tally()  # of NLL(B) - NLL(A)
        self._divergences = Tally()

    def add(self, pairs: Sequence[Pair]) -> None:
        """Scored tokens; ValueError if a number is not finite."""
        if not all(math.isfinite(value) for pair in pairs for value in pair):
            raise ValueError("the models gave a log-probability that is not a finite number")
        self.num_tokens += len(pairs)
        self._num_same += sum(pair.same_top for pair in pairs)
        # a tally adds up negated log-probabilities
        self._differences.add_logprobs([pair.logprob_b - pair.logprob_a for pair in pairs])
        self._divergences.add_logprobs([-pair.kl for pair in pairs])

    def metrics(self) -> dict[str, float | int | None]:
        """The means over tokens in nats, with their standard errors; None is for no number.

        perplexity_ratio: of B to A, e to the nll_difference.
        nll_difference: of NLL(B) - NLL(A) token by token, positive where A predicts better. Its error is that of the
            pairs, mostly far less than the errors of the two perplexities together.
        kl_divergence: of KL(A || B).
        top1_agreement: share of tokens at which both hold the same token for the most probable.
        """
        n = self.num_tokens

        def mean(tally: Tally) -> float | None:
            return tally.nll_sum / n if n else None

        difference = mean(self._differences)
        return {
            "num_tokens": n,
            "perplexity_ratio": None if difference is None else math.exp(min(difference, 700.0)),
            "nll_difference": difference,
            "nll_difference_stderr": self._differences.nll_stderr,
            "kl_divergence": mean(self._divergences),
            "kl_divergence_stderr": self._divergences.nll_stderr,
            "top1_agreement": self._num_same / n if n else None,
        }
