"""Passes over rows of logits in torch: draw a token, score a target, apply a mask. Kernels have the same definitions.

Every operation works on each row by itself, so that a row's result depends on its own logits and settings alone, to
the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends.base import Mask

NOTHING, UNDECIDED = -1, -2  # instead of a token
CACHED_ROWS = 8  # drawn or scored at once, so that they stay in the processor's cache between the passes over them
TINY = 1e-200  # a top_p of 0 keeps the best token
BLOCK = 128  # tokens whose weights are summed before their sums are


class RowScores(NamedTuple):
    """The norm is NaN for a row with NaN or +inf in it, or with nothing above -inf."""

    own: Tensor  # float32 [rows]: the target's logit
    peak: Tensor  # float32 [rows]: the largest logit, or NaN if there is one
    norm: Tensor  # float64 [rows]: log of the sum of e^(logit - peak)
    best: Tensor  # int64 [rows]: lowest id of the largest logit, or of NaN
    rank: Tensor  # int64 [rows]: 1 + how many tokens are before the target, by logit, then by id
    top_ids: Tensor  # int64 [rows, top]: the best tokens, best first, equal ones by id
    top_logits: Tensor  # float32 [rows, top]: theirs


def draw_tokens(logits: Tensor, settings: Tensor) -> Tensor:
    """A token of each row, or NOTHING where all logits are -inf, or UNDECIDED where the numbers were not enough.

    logits [rows, vocab]; settings float64 [rows, 4 + attempts]: temperature (0: the best token of lowest id), top_k
    (0: all), top_p, min_p and numbers in [0, 1), of which top_p may use more than one -> int64 [rows]. A row's token
    depends on the row and its settings alone.
    """
    pairs = zip(logits.split(CACHED_ROWS), settings.split(CACHED_ROWS), strict=True)
    return torch.cat([_draw_few(few.float(), theirs) for few, theirs in pairs])


def row_scores(logits: Tensor, targets: Tensor, top: int) -> RowScores:
    """Of logits [rows, vocab], targets int64 [rows] and top at most vocab; IndexError for a target outside."""
    pairs = zip(logits.split(CACHED_ROWS), targets.split(CACHED_ROWS), strict=True)
    parts = [_few_row_scores(few.to(torch.float32, copy=True), wanted, top) for few, wanted in pairs]
    return RowScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def entropies(logits: Tensor, peak: Tensor, norm: Tensor) -> Tensor:
    """Nats of each row [rows, vocab], whose peak and norm are those of `RowScores`: float64 [rows]."""
    found = []
    for few, top in zip(logits.split(CACHED_ROWS), peak.split(CACHED_ROWS), strict=True):
        distance = few.float() - top[:, None]
        found.append(block_sums(distance.exp().mul_(distance)).sum(-1))
    return norm - torch.cat(found) / norm.exp()


def log_masses(logits: Tensor, peak: Tensor, ids: Tensor) -> Tensor:
    """log of the sum of e^(logit - peak) over the tokens `ids` in each row [rows, vocab]: float64 [rows]."""
    found = []
    for few, top in zip(logits.split(CACHED_ROWS), peak.split(CACHED_ROWS), strict=True):
        distance = few.float().index_select(1, ids).sub_(top[:, None])
        least = distance.amax(-1, keepdim=True)  # what is far below the peak counts, too
        found.append(block_sums(distance.sub_(least).exp_()).sum(-1).log() + least[:, 0])
    return torch.cat(found)


def copy_allowed(logits: Tensor, masks: Sequence[Mask | None]) -> Tensor:
    """logits [rows, vocab] -> float32 copy, -inf where a row's mask has 0."""
    out = logits.to(torch.float32, copy=True)
    for row, mask in zip(out, masks, strict=True):
        if mask is not None:
            bits = np.unpackbits(mask, count=logits.shape[1], bitorder="little")
            row.masked_fill_(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)
    return out


def argmax(logits: Tensor) -> Tensor:
    """The lowest id of the best token in each row [n], or of NaN."""
    if _in_numpy(logits):  # its argmax is many times faster
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def best_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row [n, k] and their ids, best first, equal ones by id; topk leaves the latter open."""
    values, ids = logits.topk(k, -1)
    last = values[:, -1:]
    found = _equal(logits, last)
    row = found // logits.shape[1]
    place = (values > last).sum(-1)[row] + _places(row, len(values))
    fits = place < k
    ids[row[fits], place[fits]] = (found % logits.shape[1])[fits]
    order = ids.argsort(-1)
    order = order.gather(1, values.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    return values.gather(1, order), ids.gather(1, order)


def _draw_few(logits: Tensor, settings: Tensor) -> Tensor:
    """logits float32 [n, vocab], settings [n, 4 + attempts] -> int64 [n]."""
    best = argmax(logits)
    peak = logits.gather(1, best[:, None])[:, 0]
    tokens = torch.where(peak == -torch.inf, NOTHING, best)
    drawn, top_k = peak.isfinite() & (settings[:, 0] > 0), settings[:, 1]
    if len(rows := (drawn & (top_k == 0)).nonzero()[:, 0]):
        tokens[rows] = _draw(logits[rows], settings[rows])
    if len(rows := (drawn & (top_k > 0)).nonzero()[:, 0]):
        tokens[rows] = _draw_of_best(logits[rows], settings[rows])
    return tokens


def _draw_of_best(logits: Tensor, settings: Tensor) -> Tensor:
    """With top_k: the best tokens in the order of their ids, and nothing after them."""
    top_k, vocab = settings[:, 1:2], logits.shape[1]
    values, ids = best_tokens(logits, min(int(top_k.max()), vocab))
    beyond = torch.arange(ids.shape[1], device=ids.device) >= top_k
    ids, order = ids.masked_fill(beyond, vocab).sort(-1)
    index = _draw(values.masked_fill(beyond, -torch.inf).gather(1, order), settings)
    return torch.where(index < 0, index, ids.gather(1, index.clamp_min(0)[:, None])[:, 0])


def _draw(logits: Tensor, settings: Tensor) -> Tensor:
    """Finite peaks, temperatures above 0: an index into each row, or UNDECIDED; int64 [n]."""
    temperature, _, top_p, min_p = settings[:, :4].split(1, -1)
    # subtracting from the maximum first keeps tiny temperatures finite; the best token's distance is 0, its weight 1
    weights = (logits.amax(-1, keepdim=True) - logits).div_(temperature.float()).neg_().exp_()
    weights = kept_where(torch.ge, weights, min_p.float(), weights)
    limits = block_sums(weights).sum(-1, keepdim=True) * top_p.clamp_min(TINY)
    tokens = torch.full((len(logits),), UNDECIDED, device=logits.device)
    pending = torch.arange(len(logits), device=logits.device)
    for numbers in settings[:, 4:].split(1, -1):
        index = inverse(weights, numbers[pending])
        tokens[pending] = index
        weights = kept_where(torch.gt, logits, logits.gather(1, index[:, None]), weights)  # of those more probable
        out = (block_sums(weights).sum(-1, keepdim=True) >= limits) & (top_p[pending] < 1)
        out = out[:, 0].nonzero()[:, 0]
        pending, logits, weights, limits = (kept[out] for kept in (pending, logits, weights, limits))
        tokens[pending] = UNDECIDED
        if not len(out):
            break
    return tokens


def inverse(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first index at which the cumulative weight passes number * total: [n, m], [n, 1] -> int64 [n].

    In two steps, first among sums of BLOCK weights; never an index of weight 0 unless all are.
    """
    size = weights.shape[1]
    sums = block_sums(weights)
    block, rest = _pass(sums, numbers * sums.sum(-1, keepdim=True))
    inside = block * BLOCK + torch.arange(BLOCK, device=block.device)
    members = weights.gather(1, inside.clamp_max(size - 1)).double() * (inside < size)
    index, _ = _pass(members, rest)
    return (block * BLOCK + index)[:, 0].clamp_max(size - 1)


def _pass(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight passes the target, and what of the target was left there: both [n, 1]."""
    cumulative = weights.cumsum(-1)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)  # against rounding
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return index, target - (cumulative - weights).gather(1, index)


def block_sums(weights: Tensor) -> Tensor:
    """[n, m] float32 -> float64 [n, m / BLOCK]; a row's bits do not depend on n, as those of one long sum do."""
    padding = -weights.shape[1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    return padded.view(len(weights), -1, BLOCK).sum(-1).double()


def kept_where(compare: Callable[..., Tensor], values: Tensor, bounds: Tensor, weights: Tensor) -> Tensor:
    """The weights where the comparison holds, else 0. Not torch.where or masked_fill: on a CPU these guess wrongly at
    every other element, and cost eight times as much as a product with 0 and 1."""
    return compare(values, bounds, out=torch.empty_like(weights)).mul_(weights)


def _few_row_scores(logits: Tensor, targets: Tensor, top: int) -> RowScores:
    """Overwrites the logits."""
    best = argmax(logits)
    own, peak = logits.gather(1, targets[:, None]), logits.gather(1, best[:, None])
    rank = _ranks(logits, own, targets)
    values, ids = best_tokens(logits, top) if top > 1 else (peak[:, :top], best[:, None][:, :top])
    norm = block_sums(logits.sub_(peak).exp_()).sum(-1).log()
    return RowScores(own[:, 0], peak[:, 0], norm, best, rank, ids, values)


def _ranks(logits: Tensor, mine: Tensor, targets: Tensor) -> Tensor:
    """1 + how many tokens are before the target, by logit, then by id: int64 [n]."""
    if _in_numpy(logits):  # it counts a row of booleans many times faster
        table, own = logits.numpy(), mine.numpy()
        ranks = [
            1 + int(np.count_nonzero(row[:t] >= p) + np.count_nonzero(row[t:] > p))
            for row, p, t in zip(table, own, targets.tolist(), strict=True)
        ]
        return torch.tensor(ranks)
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > mine) | ((logits == mine) & (ids < targets[:, None]))
    return 1 + before.sum(-1)


def _equal(values: Tensor, wanted: Tensor) -> Tensor:
    """Positions in values.view(-1), [n, vocab], of what equals its row's `wanted` [n, 1]; int64, ascending."""
    if _in_numpy(values):  # it compares and searches several times faster
        return torch.from_numpy(np.flatnonzero(values.numpy() == wanted.numpy()))
    return (values == wanted).view(-1).nonzero()[:, 0]


def _places(row: Tensor, n: int) -> Tensor:
    """For the sorted row numbers of some elements: each one's place within its row."""
    count = row.bincount(minlength=n)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]


def _in_numpy(tensor: Tensor) -> bool:
    """Whether NumPy can work on the tensor where it lies."""
    return tensor.device.type == "cpu"
