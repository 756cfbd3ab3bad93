"""From logits to tokens and log-probabilities: pure functions of the logits and one row of parameters each.

Random numbers are stateless: a row's one uniform number is a hash of (seed, choice, position), so that neither
batching nor preemption changes what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import Logprobs

CANDIDATES = 256  # tokens that a top-p row looks at first; the whole vocabulary is sorted only if they do not suffice


@dataclass(frozen=True)
class SamplingRow:
    """How one row of logits is sampled."""

    temperature: float
    top_p: float
    top_k: int  # 0: all
    uniform: float  # in [0, 1)
    banned: tuple[int, ...] = ()


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits from (seed, choice, position)."""
    key = f"{seed}:{choice}:{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token per row of float32 logits [rows, vocab]: greedy at temperature 0, else by inverse distribution."""
    if any(row.banned for row in rows):
        logits = logits.clone()
        for i, row in enumerate(rows):
            logits[i, list(row.banned)] = -torch.inf
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        chosen = [rows[i] for i in drawn]
        temperature = torch.tensor([[row.temperature] for row in chosen], device=logits.device)
        draws = torch.tensor([[row.uniform] for row in chosen], dtype=torch.float64, device=logits.device)
        # subtracting the maximum first keeps tiny temperatures finite
        scaled = (logits[drawn] - logits[drawn].amax(-1, keepdim=True)) / temperature
        tokens[drawn] = _draw(scaled, chosen, draws)
    found: list[int] = tokens.tolist()
    return found


def _draw(scaled: Tensor, rows: Sequence[SamplingRow], draws: Tensor) -> Tensor:
    """scaled [n, vocab], draws [n, 1] -> int64 [n]."""
    filtered = [i for i, row in enumerate(rows) if row.top_k or row.top_p < 1]
    free = [i for i in range(len(rows)) if i not in set(filtered)]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=scaled.device)
    if free:
        tokens[free] = _inverse(scaled[free].softmax(-1), draws[free])
    if filtered:
        tokens[filtered] = _draw_filtered(scaled[filtered], [rows[i] for i in filtered], draws[filtered])
    return tokens


def _draw_filtered(scaled: Tensor, rows: Sequence[SamplingRow], draws: Tensor) -> Tensor:
    vocab = scaled.shape[1]
    probabilities = scaled.softmax(-1)
    width = min(vocab, max(CANDIDATES, *(row.top_k for row in rows)))
    top_p = torch.tensor([[row.top_p] for row in rows], device=scaled.device)
    top_k = torch.tensor([[min(row.top_k, vocab) or vocab] for row in rows], device=scaled.device)
    while True:
        best, ids = probabilities.topk(width, -1)
        kept = torch.where(torch.arange(width, device=scaled.device) < top_k, best, 0)
        # top-p applies to what top-k left, renormalised
        total = torch.where(top_k < vocab, kept.sum(-1, keepdim=True), 1.0)
        before = kept.cumsum(-1) - kept
        enough = (kept.sum(-1, keepdim=True) >= top_p * total) | (top_k <= width)
        if width == vocab or bool(enough.all()):
            break
        width = vocab
    kept = torch.where(before < top_p * total, kept, 0)
    return ids.gather(1, _inverse(kept, draws)[:, None])[:, 0]


def _inverse(weights: Tensor, draws: Tensor) -> Tensor:
    """The first index at which the cumulative weight passes draw · total: weights [n, m] -> int64 [n]."""
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)  # never a weight of 0 by rounding
    return torch.minimum(index[:, 0], last)


def score(logits: Tensor, targets: Tensor, top: int) -> Logprobs:
    """Log-probabilities of `targets` (int64 [rows]) under float32 logits [rows, vocab], with the `top` best tokens.

    The target's number is the very one in the list of the best when it is among them. Ties are broken towards
    the lower id in `rank`.
    """
    logprobs = logits.log_softmax(-1)
    mine = logprobs.gather(1, targets[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    ranks = 1 + ((logprobs > mine) | ((logprobs == mine) & (ids < targets[:, None]))).sum(-1)
    best, best_ids = logprobs.topk(min(top, logits.shape[1]), -1)
    return Logprobs(mine[:, 0].tolist(), ranks.tolist(), best_ids.tolist(), best.tolist())
