"""From logits to tokens and log-probabilities: pure functions of the logits and one row of parameters each.

The order is vLLM's: grammar, allowed tokens, bans (bad words, min_tokens) and logit bias; repetition, then frequency
and presence penalties; temperature; min_p; top_k; top_p. Whatever is forbidden has the logit -inf from its step on,
so that no bias brings it back. If nothing is left, all but the grammar is waived for that row, and its best token
is taken. Log-probabilities are scored from the untouched logits.

Random numbers are stateless: a row's one uniform number is a hash of (seed, choice, position), so that neither
batching nor preemption changes what is drawn. Every operation works on each row by itself, so that a row's result
depends on its own logits and parameters alone, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.request import Logprobs, SamplingParams

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SCORE_ROWS = 8  # rows scored at once, so that they stay in the processor's cache between the passes over them

# Tokens are bucketed by their distance to the best: powers of two from 2**-20 to 2**20, each in 64 steps.
BUCKET_SHIFT = 17  # of float32's 23 bits of mantissa, six remain
FIRST_BUCKET = (127 - 20) << 6
NUM_BUCKETS = 40 << 6
BLOCK = 128  # tokens whose weights are summed before their sums are


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """How one row of logits is sampled; ids are distinct within each array."""

    params: SamplingParams
    uniform: float = 0.0  # in [0, 1)
    grammar_mask: npt.NDArray[np.uint8] | None = None  # a bit per token, lowest first; 0: not allowed
    allowed: Ids | None = None
    banned: Sequence[int] = ()
    bias_ids: Ids | None = None
    bias: Floats | None = None
    seen: Ids | None = None  # tokens that penalties look at
    counts: Floats | None = None  # how often each of them was generated; 0: it is in the prompt only


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits from (seed, choice, position)."""
    key = f"{seed}:{choice}:{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token per row of float32 logits [rows, vocab]: greedy at temperature 0, else by inverse distribution."""
    steered = _penalize(_constrain(logits, rows), logits, rows)
    best, tokens = steered.max(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if bool((best == -torch.inf).any()):
        stuck = (best == -torch.inf).nonzero()[:, 0].tolist()
        fallback = [SamplingRow(params=rows[i].params, grammar_mask=rows[i].grammar_mask) for i in stuck]
        tokens[stuck] = _constrain(logits[stuck], fallback).argmax(-1)
        drawn = [i for i in drawn if i not in set(stuck)]
    if drawn:
        tokens[drawn] = _draw(_take(steered, drawn), _take(best, drawn), [rows[i] for i in drawn])
    found: list[int] = tokens.tolist()
    return found


def _constrain(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """-inf for what the grammar, allowed_token_ids or bans forbid, then the bias; a copy if there is any of it."""
    allowed = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    banned = [(i, np.asarray(row.banned, np.int64)) for i, row in enumerate(rows) if row.banned]
    biased = [(i, row.bias_ids) for i, row in enumerate(rows) if row.bias_ids is not None]
    masks = [(i, row.grammar_mask) for i, row in enumerate(rows) if row.grammar_mask is not None]
    if not (allowed or banned or biased or masks):
        return logits
    logits = logits.clone()
    vocab, flat = logits.shape[1], logits.view(-1)
    if allowed:
        index = _flat_index(allowed, logits)
        kept = flat[index]
        logits[[i for i, _ in allowed]] = -torch.inf
        flat[index] = kept
    if banned:
        flat[_flat_index(banned, logits)] = -torch.inf
    if biased:
        bias = np.concatenate([row.bias for row in rows if row.bias is not None])
        flat[_flat_index(biased, logits)] += torch.from_numpy(bias).to(logits.device)
    if masks:
        bits = np.unpackbits(np.stack([mask for _, mask in masks]), axis=1, count=vocab, bitorder="little")
        forbidden = torch.from_numpy(bits == 0).to(logits.device)
        for n, (i, _) in enumerate(masks):
            logits[i].masked_fill_(forbidden[n], -torch.inf)
    return logits


def _penalize(steered: Tensor, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Penalties at the tokens seen: repetition divides positive logits and multiplies negative ones; what was
    generated loses frequency_penalty for each time and presence_penalty once."""
    seen = [(i, row.seen) for i, row in enumerate(rows) if row.seen is not None]
    if not seen:
        return steered
    if steered is logits:
        steered = logits.clone()

    def spread(values: list[float]) -> Tensor:
        repeated = np.repeat(np.array(values, np.float32), [len(ids) for _, ids in seen])
        return torch.from_numpy(repeated).to(logits.device)

    params = [rows[i].params for i, _ in seen]
    counts = torch.from_numpy(np.concatenate([row.counts for row in rows if row.counts is not None])).to(logits.device)
    repetition = spread([p.repetition_penalty for p in params])
    index, flat = _flat_index(seen, logits), steered.view(-1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * spread([p.frequency_penalty for p in params])
    values -= (counts > 0) * spread([p.presence_penalty for p in params])
    flat[index] = values
    return steered


def _flat_index(ids: Sequence[tuple[int, Ids]], logits: Tensor) -> Tensor:
    """Positions in logits.view(-1) of (row, token ids) pairs: int64 [sum of lengths]."""
    return torch.from_numpy(np.concatenate([row * logits.shape[1] + tokens for row, tokens in ids])).to(logits.device)


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """The given rows; no copy if that is all of them."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [n, vocab] with their maxima [n] -> int64 [n]."""
    temperature = torch.tensor([[row.params.temperature] for row in rows], device=logits.device)
    # subtracting the maximum first keeps tiny temperatures finite; the best token's weight is 1
    scaled = (logits - best[:, None]).div_(temperature)
    filtered = [i for i, row in enumerate(rows) if row.params.top_k or row.params.top_p < 1 or row.params.min_p > 0]
    if filtered:
        kept = _filter(_take(scaled, filtered), [rows[i].params for i in filtered])
        if len(filtered) == len(rows):
            weights = kept
        else:
            weights = scaled.exp_()
            weights[filtered] = kept
    else:
        weights = scaled.exp_()
    draws = torch.tensor([[row.uniform] for row in rows], dtype=torch.float64, device=logits.device)
    return _inverse(weights, draws)


def _filter(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """exp(scaled) [n, vocab], 0 for what min_p, top_k and top_p take out."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scaled.device)[:, None]

    weights = scaled.exp()
    if any(p.min_p for p in params):
        weights.masked_fill_(weights < column([p.min_p for p in params]).float(), 0)
    cut_k, cut_p = any(p.top_k for p in params), any(p.top_p < 1 for p in params)
    if not (cut_k or cut_p):
        return weights
    buckets = _buckets(scaled)
    if cut_k:
        ones = torch.ones(1, 1, device=scaled.device).expand_as(scaled)
        _keep_best(weights, scaled, buckets, ones, column([p.top_k or torch.inf for p in params]))
    if cut_p:
        top_p = column([p.top_p for p in params])
        mass = weights.sum(-1, keepdim=True)
        _keep_best(weights, scaled, buckets, weights, torch.where(top_p < 1, mass * top_p, torch.inf))
    return weights


def _buckets(scaled: Tensor) -> Tensor:
    """Distances to the best token, [n, vocab] of at most 0 -> int64 [n, vocab] that does not fall as they grow.

    A positive float's bits grow with it. The best token's -0.0 is a negative number of bits, and goes to bucket 0;
    so or to the last one does NaN.
    """
    bits = (-scaled).view(torch.int32) >> BUCKET_SHIFT
    return bits.sub_(FIRST_BUCKET).clamp_(0, NUM_BUCKETS - 1).long()


def _keep_best(weights: Tensor, scaled: Tensor, buckets: Tensor, measure: Tensor, limits: Tensor) -> None:
    """Zero all `weights` [n, vocab] but the fewest best tokens whose `measure` [n, vocab] adds up to `limits` [n, 1].

    Equal tokens go by their id. Nothing is sorted but the one bucket per row in which the limit is reached.
    """
    n = len(weights)
    sums = torch.zeros(n, NUM_BUCKETS, device=weights.device).scatter_add_(1, buckets, measure)
    cumulative = sums.double().cumsum(-1)
    limits = torch.where(limits < torch.inf, limits.minimum(cumulative[:, -1:]), limits).clamp_min(1e-30)
    edge = torch.searchsorted(cumulative, limits).clamp_max(NUM_BUCKETS - 1)
    before = cumulative.gather(1, edge) - sums.gather(1, edge)
    weights.masked_fill_(buckets > edge, 0)
    # the edge's tokens of each row side by side, [n, widest]
    row, column = (buckets == edge).nonzero(as_tuple=True)
    place, widest = _places(row, n)
    padded = torch.full((n, widest), -torch.inf, device=row.device)
    padded[row, place] = scaled[row, column]
    order = padded.argsort(dim=-1, descending=True, stable=True)
    inside = torch.zeros(padded.shape, dtype=torch.float64, device=row.device)
    inside[row, place] = measure[row, column].double()
    inside = inside.gather(1, order)
    late = before + inside.cumsum(-1) - inside >= limits
    drop = torch.zeros_like(late).scatter_(1, order, late)[row, place]
    weights[row[drop], column[drop]] = 0


def _places(row: Tensor, n: int) -> tuple[Tensor, int]:
    """For the sorted row numbers of some elements: each one's place within its row, and the most that a row has."""
    count = row.bincount(minlength=n)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row], int(count.max())


def _inverse(weights: Tensor, draws: Tensor) -> Tensor:
    """The first index at which the cumulative weight passes draw · total: [n, m], [n, 1] -> int64 [n].

    In two steps, first among sums of BLOCK weights; never an index of weight 0 unless all are.
    """
    n, size = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -size % BLOCK)).view(n, -1, BLOCK)
    sums = blocks.sum(-1).double()
    block, rest = _pass(sums, draws * sums.sum(-1, keepdim=True))
    index, _ = _pass(blocks[torch.arange(n, device=block.device), block[:, 0]].double(), rest)
    return (block * BLOCK + index)[:, 0].clamp_max(size - 1)


def _pass(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight passes the target, and what of the target was left there: both [n, 1]."""
    cumulative = weights.cumsum(-1)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)  # against rounding
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return index, target - (cumulative - weights).gather(1, index)


def score(logits: Tensor, targets: Tensor, top: int) -> Logprobs:
    """Log-probabilities of `targets` (int64 [rows]) under logits [rows, vocab], with the `top` best tokens.

    Logits that are not float32 become so a few rows at a time. The target's number is the very one in the list of the
    best when it is among them. Ties are broken towards the lower id, in `rank` and in the list.
    """
    parts = [
        (_score_best if top <= 1 else _score_top)(few.to(torch.float32, copy=True), wanted, top)
        for few, wanted in zip(logits.split(SCORE_ROWS), targets.split(SCORE_ROWS), strict=True)
    ]
    own, values, ids, ranks = zip(*parts, strict=True)
    return Logprobs(
        torch.cat(own).tolist(),
        [rank for few in ranks for rank in few],
        torch.cat(ids).tolist(),
        torch.cat(values).tolist(),
    )


def _score_best(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """`_score_top` for one alternative or none, without a table of all log-probabilities; overwrites the logits."""
    best = _argmax(logits)[:, None]
    own, peak = logits.gather(1, targets[:, None]), logits.gather(1, best)
    ranks = _ranks(logits, own, targets)
    norm = logits.sub_(peak).exp_().sum(-1, keepdim=True).log_()
    return (own - peak - norm)[:, 0], (peak - peak - norm)[:, :top], best[:, :top], ranks


def _score_top(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Log-probabilities of targets [n], those and the ids of the best [n, top], and the targets' ranks."""
    logprobs = logits.log_softmax(-1)
    mine = logprobs.gather(1, targets[:, None])
    return mine[:, 0], *_top(logprobs, min(top, logits.shape[1])), _ranks(logprobs, mine, targets)


def _argmax(logits: Tensor) -> Tensor:
    """The lowest id of the best token in each row [n]."""
    if logits.device.type == "cpu":  # NumPy's is many times faster
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _top(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row [n, k] and their ids, best first, equal ones by id; topk leaves the latter open."""
    values, ids = logprobs.topk(k, -1)
    if not k:
        return values, ids
    last = values[:, -1:]
    row, column = (logprobs == last).nonzero(as_tuple=True)
    place = (values > last).sum(-1)[row] + _places(row, len(values))[0]
    fits = place < k
    ids[row[fits], place[fits]] = column[fits]
    order = ids.argsort(-1)
    order = order.gather(1, values.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    return values.gather(1, order), ids.gather(1, order)


def _ranks(logprobs: Tensor, mine: Tensor, targets: Tensor) -> list[int]:
    """1 + how many tokens are before the target, by probability, then by id."""
    if logprobs.device.type == "cpu":  # NumPy counts a row of booleans many times faster
        table, own = logprobs.numpy(), mine.numpy()
        return [
            1 + int(np.count_nonzero(row[:t] >= p) + np.count_nonzero(row[t:] > p))
            for row, p, t in zip(table, own, targets.tolist(), strict=True)
        ]
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    before = (logprobs > mine) | ((logprobs == mine) & (ids < targets[:, None]))
    ranks: list[int] = (1 + before.sum(-1)).tolist()
    return ranks
