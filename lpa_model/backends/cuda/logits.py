"""Passes over rows of logits that never wait for the device: as `lpa_model.backends.torch.rows` defines them.

No shape here follows from a value on the device, so that a CUDA graph can hold them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpa_model.backends.torch.rows import NOTHING, TINY, UNDECIDED, RowScores, block_sums, inverse, kept_where

LOW = 0xFFFFFFFF  # the lower half of a key


def draw_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, vocab] -> the best token of lowest id, or NOTHING, and its logit: [n] each."""
    best = logits.argmax(-1)
    peak = logits.gather(1, best[:, None])[:, 0]
    return torch.where(peak == -torch.inf, NOTHING, best), peak


def draw_tokens(logits: Tensor, settings: Tensor, most: int | None) -> Tensor:
    """float32 [n, vocab] and float64 [n, 4 + attempts], as `torch.rows.draw_tokens` takes them -> int64 [n].

    `most`: None if no row has a top_k; else the largest one, and every row that is not greedy has one.
    """
    tokens, peak = draw_greedy(logits)
    drawn = _draw(logits, settings) if most is None else _draw_of_best(logits, settings, most)
    return torch.where(peak.isfinite() & (settings[:, 0] > 0), drawn, tokens)


def best_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """float32 [n, vocab] -> the k best of each row [n, k] and their ids, best first, equal ones by id."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as whole numbers in the order of the logits
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.long() << 32) + (LOW - ids)  # of equal logits the one of lower id is larger
    best = LOW - (keys.topk(k, -1).values & LOW)
    return logits.gather(1, best), best


def row_scores(logits: Tensor, targets: Tensor, top: int) -> RowScores:
    """Of logits [n, vocab], targets int64 [n] within the vocabulary and top at most vocab."""
    table = logits.to(torch.float32, copy=True)
    best = table.argmax(-1)
    own, peak = table.gather(1, targets[:, None]), table.gather(1, best[:, None])
    ids = torch.arange(table.shape[1], device=table.device)
    rank = 1 + ((table > own) | ((table == own) & (ids < targets[:, None]))).sum(-1)
    values, top_ids = best_tokens(table, top) if top > 1 else (peak[:, :top], best[:, None][:, :top])
    norm = block_sums(table.sub_(peak).exp_()).sum(-1).log()
    return RowScores(own[:, 0], peak[:, 0], norm, best, rank, top_ids, values)


def entropies(logits: Tensor, found: RowScores) -> Tensor:
    """Nats of each row: float64 [n]."""
    distance = logits.float() - found.peak[:, None]
    return found.norm - block_sums(distance.exp().mul_(distance)).sum(-1) / found.norm.exp()


def log_masses(logits: Tensor, found: RowScores, ids: Tensor) -> Tensor:
    """Log-probability that the token is one of `ids`: float64 [n]."""
    distance = logits.float().index_select(1, ids).sub_(found.peak[:, None])
    least = distance.amax(-1, keepdim=True)  # what is far below the peak counts, too
    return block_sums(distance.sub_(least).exp_()).sum(-1).log() + least[:, 0] - found.norm


def broken(logits: Tensor) -> Tensor:
    """Which rows hold a number that is not finite: bool [n]."""
    return logits.sum(-1, dtype=torch.float32).isfinite().logical_not()


def _draw_of_best(logits: Tensor, settings: Tensor, most: int) -> Tensor:
    """With top_k: the best tokens in the order of their ids, and nothing after them."""
    vocab = logits.shape[1]
    values, ids = best_tokens(logits, min(most, vocab))
    beyond = torch.arange(ids.shape[1], device=ids.device) >= settings[:, 1:2]
    ids, order = ids.masked_fill(beyond, vocab).sort(-1)
    index = _draw(values.masked_fill(beyond, -torch.inf).gather(1, order), settings)
    return torch.where(index < 0, index, ids.gather(1, index.clamp_min(0)[:, None])[:, 0])


def _draw(logits: Tensor, settings: Tensor) -> Tensor:
    """An index into each row, or UNDECIDED after as many attempts as there are numbers: int64 [n]."""
    temperature, _, top_p, min_p = settings[:, :4].split(1, -1)
    weights = (logits.amax(-1, keepdim=True) - logits).div_(temperature.float()).neg_().exp_()
    weights = kept_where(torch.ge, weights, min_p.float(), weights)
    limits = block_sums(weights).sum(-1, keepdim=True) * top_p.clamp_min(TINY)
    pending = torch.ones_like(top_p, dtype=torch.bool)
    tokens = torch.full_like(pending, UNDECIDED, dtype=torch.int64)
    attempts = settings.shape[1] - 4
    for attempt in range(attempts):
        index = inverse(weights, settings[:, 4 + attempt : 5 + attempt])[:, None]
        weights = kept_where(torch.gt, logits, logits.gather(1, index), weights)  # of those more probable
        out = (block_sums(weights).sum(-1, keepdim=True) >= limits) & (top_p < 1)
        tokens = torch.where(pending & ~out, index, tokens)
        pending = pending & out
    return tokens[:, 0]
