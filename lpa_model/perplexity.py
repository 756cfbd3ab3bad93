"""How a text is cut into windows to be scored, and what its log-probabilities add up to. No HTTP.

NLL is the negative log-likelihood in nats. A token is scored if the model has seen at least one token before it;
there is no BOS, so token 0 of a text is never scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lpa_model.model import LPAForCausalLM

Method = Literal["full", "sliding"]

LOGIT_ROWS = 256  # rows of logits held at a time: the vocabulary times this, in float32, is the peak of scoring


@dataclass(frozen=True)
class Window:
    """The model reads tokens start..end-1 of a text, and tokens first_scored..end-1 are scored."""

    start: int
    end: int
    first_scored: int

    @property
    def num_scored(self) -> int:
        return self.end - self.first_scored


def windows(num_tokens: int, method: Method, max_length: int, stride: int) -> list[Window]:
    """The windows that score tokens 1..num_tokens-1 of a text, each exactly once, in order.

    `full` is one window. `sliding` windows hold `max_length` tokens, context included, and begin `stride` tokens
    after one another; each scores what those before it did not, so that beyond the first window a token has at
    least max_length - stride tokens of context. `stride` has no meaning for `full`.

    Returns:
        No window for fewer than two tokens: there is nothing to score.

    Raises:
        ValueError: the text does not fit the one window of `full`, or not 1 <= stride < max_length.
    """
    if method == "full":
        if num_tokens > max_length:
            raise ValueError(
                f"max_length: the text has {num_tokens} tokens and method 'full' takes at most {max_length}; "
                "use method 'sliding'"
            )
        return [Window(0, num_tokens, 1)] if num_tokens > 1 else []
    if not 1 <= stride < max_length:
        raise ValueError(f"stride: {stride} is not between 1 and max_length - 1 = {max_length - 1}")
    found: list[Window] = []
    start, scored = 0, 1
    while scored < num_tokens:
        end = min(start + max_length, num_tokens)
        found.append(Window(start, end, scored))
        start, scored = start + stride, end
    return found


def perplexity(nll_sum: float, num_tokens: int) -> float:
    """exp(nll_sum / num_tokens), infinite where that overflows; ValueError if no token was scored."""
    if num_tokens < 1:
        raise ValueError("num_tokens: no token was scored, so there is no perplexity")
    try:
        return math.exp(nll_sum / num_tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """Nats over a text as bits per byte of its UTF-8 form; ValueError for an empty text."""
    if num_bytes < 1:
        raise ValueError("num_bytes: an empty text has no bits per byte")
    return nll_sum / math.log(2) / num_bytes


def score(
    model: LPAForCausalLM,
    ids: Sequence[int],
    method: Method,
    max_length: int,
    stride: int,
    on_window: Callable[[Window], None] | None = None,
) -> tuple[float, int]:
    """NLL of a token list in nats and the number of tokens it is the sum of, computed in this process.

    Each window is one plain forward; logits and log-softmax are float32 in chunks of rows, sums are exact in float64.
    `on_window` is called after each window.

    Raises:
        ValueError: as `windows`, or a window is longer than the model's context.
    """
    context = model.config.max_position_embeddings
    if max_length > context:
        raise ValueError(f"max_length: {max_length} is more than the model's context of {context} tokens")
    device = model.embed_tokens.weight.device
    terms: list[float] = []
    num_tokens = 0
    with torch.inference_mode():
        for window in windows(len(ids), method, max_length, stride):
            tokens = torch.tensor(ids[window.start : window.end], dtype=torch.int64, device=device)
            hidden = model(tokens[None, :-1])[0]  # [window - 1, d]: the last token predicts nothing that is asked
            first = window.first_scored - window.start
            terms += _nll_terms(model, hidden[first - 1 :], tokens[first:])
            num_tokens += window.num_scored
            if on_window is not None:
                on_window(window)
    return math.fsum(terms), num_tokens


def _nll_terms(model: LPAForCausalLM, hidden: Tensor, targets: Tensor) -> list[float]:
    """-log p of targets [n] (int64), each predicted from its row of hidden [n, d]."""
    terms: list[float] = []
    for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logprobs = torch.log_softmax(model.logits(rows), dim=-1)
        terms += (-logprobs.gather(1, wanted[:, None])[:, 0]).tolist()
    return terms
