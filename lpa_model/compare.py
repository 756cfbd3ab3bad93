"""Two models at the same tokens: how far apart their predictions are. No HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lpa_model.perplexity import Tally


class Pair(NamedTuple):
    """What models A and B said at one scored token."""

    logprob_a: float
    logprob_b: float
    kl: float  # KL(A || B) of their distributions there, nats
    same_top: bool  # whether both hold the same token for the most probable


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

        nll_difference: of NLL(B) - NLL(A) token by token, positive where A predicts better. Its error is that of the
            pairs, mostly far less than the errors of the two perplexities together.
        kl_divergence: of KL(A || B).
        top1_agreement: share of tokens at which both hold the same token for the most probable.
        """
        n = self.num_tokens

        def mean(tally: Tally) -> float | None:
            return tally.nll_sum / n if n else None

        return {
            "num_tokens": n,
            "nll_difference": mean(self._differences),
            "nll_difference_stderr": self._differences.nll_stderr,
            "kl_divergence": mean(self._divergences),
            "kl_divergence_stderr": self._divergences.nll_stderr,
            "top1_agreement": self._num_same / n if n else None,
        }
