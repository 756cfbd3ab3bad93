"""A token drawn from each row of logits, as machine code: a few passes over the row while it is in the cache.

Nothing is sorted. A token is drawn from all; if those more probable have top_p of the mass, neither it nor anything
less probable may be taken, and the next one is drawn from them.
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, njit, types

from lpa_model.backends.cpu.kernels.best import COLUMNS, gather_best
from lpa_model.backends.cpu.kernels.machine import ZERO, address, compiled, fetch_add, give_back, take, widen
from lpa_model.backends.cpu.kernels.score import exp_close, find_best

CALL = np.dtype(
    [
        ("logits", np.int64),  # address of float32 or bfloat16 [rows, vocab]
        ("settings", np.int64),  # of float64 [rows, 4 + attempts]: temperature, top_k, top_p, min_p, numbers in [0, 1)
        ("tokens", np.int64),  # of int64 [rows]
        ("counter", np.int64),  # of an int64, 0: the next row
        ("rows", np.int64),
        ("vocab", np.int64),
        ("attempts", np.int64),
    ]
)
NOTHING = -1  # instead of a token: all logits are -inf
UNDECIDED = -2  # the numbers were not enough
BLOCK = 128  # tokens whose weights are summed before their sums are
TINY = 1e-200  # a top_p of 0 keeps the best token
LEAST = np.float32(-86)  # e^this times the best token's weight; what has less has none
LARGEST = np.float32(3e38)


@njit(fastmath={"contract"}, error_model="numpy")  # the same bits wherever it is compiled into
def _weigh(x, peak, scale, min_p, bound):
    """The weight of a logit, the best one's being 1, if it is above the bound."""
    distance = (x - peak) * scale
    weight = exp_close(distance)
    return weight if x > bound and distance > LEAST and weight >= min_p else ZERO


@compiled
def _sum_blocks(row, peak, scale, min_p, bound, sums):
    """Sums of BLOCK weights each; returns that of all, in float64."""
    total = 0.0
    for b in range(sums.shape[0]):
        block = row[b * BLOCK : (b + 1) * BLOCK]
        part = ZERO
        for i in range(block.shape[0]):
            part += _weigh(widen(block[i]), peak, scale, min_p, bound)
        sums[b] = part
        total += float(part)
    return total


@compiled
def _inverse(row, peak, scale, min_p, bound, sums, target):
    """The first index at which the cumulative weight passes the target; against rounding, the last with a weight."""
    cumulative = before = 0.0
    home = 0
    for b in range(sums.shape[0]):
        if sums[b] > 0:
            home, before = b, cumulative
            cumulative += float(sums[b])
            if cumulative > target:
                break
    cumulative, found = before, 0
    for i in range(home * BLOCK, min((home + 1) * BLOCK, row.shape[0])):
        weight = _weigh(widen(row[i]), peak, scale, min_p, bound)
        if weight > 0:
            found = i
            cumulative += float(weight)
            if cumulative > target:
                break
    return found


@compiled
def _draw(row, peak, settings, sums):
    """An index into the row, or UNDECIDED."""
    scale = min(np.float32(1 / settings[0]), LARGEST)
    top_p, min_p = settings[2], np.float32(settings[3])
    sums = sums[: (row.shape[0] + BLOCK - 1) // BLOCK]
    bound = np.float32(-np.inf)
    mass = _sum_blocks(row, peak, scale, min_p, bound, sums)
    limit = mass * max(top_p, TINY)
    for number in settings[4:]:
        index = _inverse(row, peak, scale, min_p, bound, sums, number * mass)
        if top_p == 1:
            return index
        bound = widen(row[index])
        mass = _sum_blocks(row, peak, scale, min_p, bound, sums)
        if mass < limit:
            return index
    return UNDECIDED


@compiled
def _work(call, infinity):
    logits = carray(address(call.logits, infinity), (call.rows, call.vocab))
    settings = carray(address(call.settings, 0.0), (call.rows, 4 + call.attempts))
    tokens = carray(address(call.tokens, 0), (call.rows,))
    sums, columns = take(((call.vocab + BLOCK - 1) // BLOCK,), ZERO), take((COLUMNS,), ZERO)
    ids, values = take((call.vocab,), 0), take((call.vocab,), ZERO)
    r = fetch_add(call.counter)
    while r < call.rows:
        row, mine = logits[r], settings[r]
        best, finite = find_best(row, infinity)
        peak, k = widen(row[best]), min(np.int64(mine[1]), call.vocab)
        if not finite:
            tokens[r] = NOTHING if peak == -np.inf else best
        elif mine[0] == 0:
            tokens[r] = best
        elif k:
            gather_best(row, k, columns, ids, values)
            index = _draw(values[:k], peak, mine, sums)
            tokens[r] = index if index < 0 else ids[index]
        else:
            tokens[r] = _draw(row, peak, mine, sums)
        r = fetch_add(call.counter)
    give_back(sums)
    give_back(columns)
    give_back(ids)
    give_back(values)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def draw_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0x7F80))


def draw_float32(call):
    _work(carray(call, (1,))[0], np.float32(np.inf))
