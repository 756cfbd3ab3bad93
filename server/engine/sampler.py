"""From logits to tokens and log-probabilities: pure functions of the logits and one row of parameters each.

The order is vLLM's: grammar, allowed tokens, bans (bad words, min_tokens) and logit bias; repetition, then frequency
and presence penalties; temperature; min_p; top_k; top_p. Whatever is forbidden has the logit -inf from its step on,
so that no bias brings it back. If nothing is left, all but the grammar is waived for that row, and its best token
is taken. Log-probabilities are scored from the untouched logits.

top_k keeps exactly k tokens, of equal ones those of lower id; they alone are sorted. top_p keeps a token if those
strictly more probable have less than top_p of the mass that min_p and top_k left. Without top_k it sorts nothing:
a token is drawn from all and taken if it is among the kept ones; if not, neither is anything less probable, and the
next one is drawn from the rest.

Random numbers are stateless: hashes of (seed, choice, position, attempt), so that neither batching nor preemption
changes what is drawn. Every operation works on each row by itself, so that a row's result depends on its own logits
and parameters alone, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lpa_model.kernels.launch import Kernel, compile_kernel
from lpa_model.kernels.row_scores import KERNELS, RowScores, row_scores
from server.engine.request import Logprobs, SamplingParams

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

CACHED_ROWS = 8  # drawn or scored at once, so that they stay in the processor's cache between the passes over them
TINY = 1e-200  # a top_p of 0 keeps the best token
BLOCK = 128  # tokens whose weights are summed before their sums are


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """How one row of logits is sampled; ids are distinct within each array."""

    params: SamplingParams
    draws: Callable[[int], float] = lambda attempt: 0.0  # numbers in [0, 1), each used once
    grammar_mask: npt.NDArray[np.uint8] | None = None  # a bit per token, lowest first; 0: not allowed
    allowed: Ids | None = None
    banned: Sequence[int] = ()
    bias_ids: Ids | None = None
    bias: Floats | None = None
    seen: Ids | None = None  # tokens that penalties look at
    counts: Floats | None = None  # how often each of them was generated; 0: it is in the prompt only


def uniform(seed: int, choice: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) with 53 random bits from (seed, choice, position, attempt)."""
    key = f"{seed}:{choice}:{position}:{attempt}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token per row of float32 logits [rows, vocab]: greedy at temperature 0, else by inverse distribution."""
    steered = _penalize(_constrain(logits, rows), logits, rows)
    best = steered.amax(-1)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    stuck = [i for i, value in enumerate(best.tolist()) if value == -torch.inf]
    if stuck:
        fallback = [SamplingRow(params=rows[i].params, grammar_mask=rows[i].grammar_mask) for i in stuck]
        tokens[stuck] = _argmax(_constrain(logits[stuck], fallback))
    free = [i for i in range(len(rows)) if i not in set(stuck)]
    greedy = [i for i in free if rows[i].params.temperature == 0]
    if greedy:
        tokens[greedy] = _argmax(_take(steered, greedy))
    drawn = [i for i in free if rows[i].params.temperature > 0]
    ranked = sorted((i for i in drawn if rows[i].params.top_k), key=lambda i: rows[i].params.top_k)
    for some in _batches(ranked):
        tokens[some] = _draw_ranked(_take(steered, some), [rows[i] for i in some])
    for some in _batches([i for i in drawn if not rows[i].params.top_k]):
        tokens[some] = _draw(_take(steered, some), _take(best, some), [rows[i] for i in some])
    found: list[int] = tokens.tolist()
    return found


def _batches(rows: list[int]) -> Iterator[list[int]]:
    return (rows[at : at + CACHED_ROWS] for at in range(0, len(rows), CACHED_ROWS))


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
    """The given rows; no copy if they are neighbours."""
    first, last = rows[0], rows[-1]
    return tensor[first : last + 1] if rows == list(range(first, last + 1)) else tensor[rows]


def _column(values: list[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Without top_k: logits [n, vocab] with their maxima [n] -> int64 [n]."""
    params = [row.params for row in rows]
    # subtracting from the maximum first keeps tiny temperatures finite; the best token's distance is 0, its weight 1
    distances = (best[:, None] - logits).div_(_column([p.temperature for p in params], logits))
    weights = distances.neg().exp_()
    if any(p.min_p for p in params):
        weights = _where(torch.ge, weights, _column([p.min_p for p in params], logits), weights)
    tokens = _inverse(weights, _column([row.draws(0) for row in rows], logits, torch.float64))
    pending = [i for i, p in enumerate(params) if p.top_p < 1]
    top_p = _column([max(p.top_p, TINY) for p in params], logits, torch.float64)
    limits = _block_sums(weights).sum(-1, keepdim=True) * top_p
    weights, attempt = _take(weights, pending) if pending else weights, 0
    while pending:
        attempt += 1
        mine = distances[pending, tokens[pending]][:, None]
        better = _where(torch.lt, _take(distances, pending), mine, weights)
        mass = _block_sums(better).sum(-1, keepdim=True)
        out = (mass >= limits[pending])[:, 0].nonzero()[:, 0].tolist()
        pending = [pending[i] for i in out]
        if pending:
            weights = _take(better, out)
            draws = _column([rows[i].draws(attempt) for i in pending], logits, torch.float64)
            tokens[pending] = _inverse(weights, draws)
    return tokens


def _draw_ranked(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """With top_k: logits [n, vocab] -> int64 [n]."""
    params = [row.params for row in rows]
    top_k = _column([p.top_k for p in params], logits)
    values, ids = _top(logits, min(max(p.top_k for p in params), logits.shape[1]))
    distances = (values[:, :1] - values) / _column([p.temperature for p in params], logits)
    weights = distances.neg().exp_().double()
    weights *= torch.arange(values.shape[1], device=logits.device) < top_k
    weights *= weights >= _column([p.min_p for p in params], logits)
    cumulative = weights.cumsum(-1)  # to be added up in order, whatever follows
    total = cumulative[:, -1:]
    top_p = _column([max(p.top_p, TINY) for p in params], logits, torch.float64)
    equal = torch.searchsorted(distances, distances).clamp_max(values.shape[1] - 1)  # the first one; more for NaN
    before = (cumulative - weights).gather(1, equal)
    weights *= (before < top_p * total) | (top_p == 1)
    draws = _column([row.draws(0) for row in rows], logits, torch.float64)
    index, _ = _pass(weights, draws * weights.cumsum(-1)[:, -1:])
    return ids.gather(1, index)[:, 0]


def _where(compare: Callable[..., Tensor], values: Tensor, bounds: Tensor, weights: Tensor) -> Tensor:
    """The weights where the comparison holds, else 0. Not torch.where or masked_fill: on a CPU these guess wrongly at
    every other element, and cost eight times as much as a product with 0 and 1."""
    return compare(values, bounds, out=torch.empty_like(weights)).mul_(weights)


def _in_numpy(tensor: Tensor) -> bool:
    """Whether NumPy can work on the tensor where it lies."""
    return tensor.device.type == "cpu"


def _equal(values: Tensor, wanted: Tensor) -> Tensor:
    """Positions in values.view(-1), [n, vocab], of what equals its row's `wanted` [n, 1]; int64, ascending."""
    if _in_numpy(values):  # it compares and searches several times faster
        return torch.from_numpy(np.flatnonzero(values.numpy() == wanted.numpy()))
    return (values == wanted).view(-1).nonzero()[:, 0]


def _places(row: Tensor, n: int) -> tuple[Tensor, int]:
    """For the sorted row numbers of some elements: each one's place within its row, and the most that a row has."""
    count = row.bincount(minlength=n)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row], int(count.max())


def _block_sums(weights: Tensor) -> Tensor:
    """[n, m] float32 -> float64 [n, m / BLOCK]; a row's bits do not depend on n, as those of one long sum do."""
    padding = -weights.shape[1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    return padded.view(len(weights), -1, BLOCK).sum(-1).double()


def _inverse(weights: Tensor, draws: Tensor) -> Tensor:
    """The first index at which the cumulative weight passes draw · total: [n, m], [n, 1] -> int64 [n].

    In two steps, first among sums of BLOCK weights; never an index of weight 0 unless all are.
    """
    size = weights.shape[1]
    sums = _block_sums(weights)
    block, rest = _pass(sums, draws * sums.sum(-1, keepdim=True))
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


def score(logits: Tensor, targets: Tensor, top: int) -> Logprobs:
    """Log-probabilities of `targets` (int64 [rows]) under logits [rows, vocab], with the `top` best tokens.

    Logits that are not float32 are taken as such, a few rows at a time. The target's number is the very one in the
    list of the best when it is among them, and does not depend on `top`. Ties are broken towards the lower id, in
    `rank` and in the list.
    """
    kernel = _score_kernel(logits)
    found = _row_scores(logits, targets) if kernel is None else row_scores(kernel, logits, targets)
    if top > 1:
        parts = [_top(few.float(), min(top, logits.shape[1])) for few in logits.split(CACHED_ROWS)]
        values, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    else:
        values, ids = found.peak[:, None][:, :top], found.best[:, None][:, :top]
    return Logprobs(
        _logprobs(found.own[:, None], found)[:, 0].tolist(),
        found.rank.tolist(),
        ids.tolist(),
        _logprobs(values, found).tolist(),
    )


def _logprobs(logits: Tensor, rows: RowScores) -> Tensor:
    """Some of each row's logits [rows, n] -> float32."""
    return (logits.double() - rows.peak[:, None] - rows.norm[:, None]).float()


def _score_kernel(logits: Tensor) -> Kernel | None:
    name = KERNELS.get(logits.dtype)
    if name is None or logits.device.type != "cpu" or not logits.is_contiguous():
        return None
    return compile_kernel(name).result()


def _row_scores(logits: Tensor, targets: Tensor) -> RowScores:
    """What the kernel finds, by torch; without a table of all log-probabilities."""
    pairs = zip(logits.split(CACHED_ROWS), targets.split(CACHED_ROWS), strict=True)
    parts = [_few_row_scores(few.to(torch.float32, copy=True), wanted) for few, wanted in pairs]
    return RowScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _few_row_scores(logits: Tensor, targets: Tensor) -> RowScores:
    """Overwrites the logits."""
    best = _argmax(logits)
    own, peak = logits.gather(1, targets[:, None]), logits.gather(1, best[:, None])
    rank = _ranks(logits, own, targets)
    norm = _block_sums(logits.sub_(peak).exp_()).sum(-1).log()
    return RowScores(own[:, 0], peak[:, 0], norm, best, rank)


def _argmax(logits: Tensor) -> Tensor:
    """The lowest id of the best token in each row [n]."""
    if _in_numpy(logits):  # its argmax is many times faster
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row [n, k] and their ids, best first, equal ones by id; topk leaves the latter open."""
    values, ids = logits.topk(k, -1)
    last = values[:, -1:]
    found = _equal(logits, last)
    row = found // logits.shape[1]
    place = (values > last).sum(-1)[row] + _places(row, len(values))[0]
    fits = place < k
    ids[row[fits], place[fits]] = (found % logits.shape[1])[fits]
    order = ids.argsort(-1)
    order = order.gather(1, values.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    return values.gather(1, order), ids.gather(1, order)


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
