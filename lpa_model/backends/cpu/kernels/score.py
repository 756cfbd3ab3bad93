"""What a row of logits says of its target and of its best tokens, as machine code, while the row is in the cache."""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, njit, types

from lpa_model.backends.cpu.kernels.best import COLUMNS, gather_best, sort_best
from lpa_model.backends.cpu.kernels.machine import (
    LOG2_E,
    ZERO,
    address,
    address_of,
    as_bits,
    as_float,
    compiled,
    copy,
    fetch_add,
    give_back,
    order,
    prefetch_rows,
    take,
    widen,
)

CALL = np.dtype(
    [
        ("logits", np.int64),  # address of float32 or bfloat16 [rows, vocab]
        ("targets", np.int64),  # of int64 [rows]
        ("own", np.int64),  # of float32 [rows]: the target's logit
        ("peak", np.int64),  # of float32 [rows]: the best token's
        ("norm", np.int64),  # of float64 [rows]: log of the sum of e^(logit - peak)
        ("best", np.int64),  # of int64 [rows]
        ("rank", np.int64),  # of int64 [rows]
        ("top_ids", np.int64),  # of int64 [rows, top]: the best tokens
        ("top_logits", np.int64),  # of float32 [rows, top]
        ("counter", np.int64),  # of an int64, 0: the next lot of rows
        ("rows", np.int64),
        ("vocab", np.int64),
        ("top", np.int64),
    ]
)
LOT = 4  # rows that one thread takes at a time
BLOCK = 1024  # logits at a time
SHIFT = np.float32(3 << 22)  # added to a small number, it leaves the nearest integer in the lowest bits


@njit(fastmath={"contract"}, error_model="numpy")  # not to be reordered
def exp_close(x):
    """e^x for x <= 0, to a unit in the last place, and 1 for 0; it ends at e^-86."""
    x = max(x, np.float32(-86))
    shifted = x * np.float32(LOG2_E) + SHIFT
    y = x - (shifted - SHIFT) * np.float32(0.6931471805599453)
    # e^y on [-ln 2 / 2, ln 2 / 2], a minimax polynomial
    series = np.float32(1.38145988e-3)
    series = series * y + np.float32(8.36871658e-3)
    series = series * y + np.float32(4.1668389e-2)
    series = series * y + np.float32(1.66665211e-1)
    series = series * y + np.float32(4.9999994e-1)
    series = series * y + np.float32(1)
    series = series * y + np.float32(1)
    return as_float(np.int32(as_bits(series) + (as_bits(shifted) << np.int32(23))))


@compiled
def find_best(row, infinity):
    """The lowest id of the largest logit, or of NaN; and whether the row has a norm: neither is that nor infinite."""
    peak = low = order(row[0])
    home = 0
    for start in range(0, row.shape[0], BLOCK):
        block = row[start : start + BLOCK]
        high = peak
        for i in range(block.shape[0]):
            key = order(block[i])
            high = key if key > high else high
            low = key if key < low else low
        if high > peak:
            peak, home = high, start
    if peak > order(infinity) or low < -order(infinity):
        for i in range(row.shape[0]):
            if widen(row[i]) != widen(row[i]):
                return i, False
    best = home
    while order(row[best]) != peak:
        best += 1
    return best, np.abs(widen(row[best])) != np.inf


@compiled
def _sum_exp(row, peak, ahead):
    """Sum of e^(logit - peak) in float64, of which as many as a block has are added up in float32."""
    total = 0.0
    for start in range(0, row.shape[0], BLOCK):
        block = row[start : start + BLOCK]
        prefetch_rows(ahead, start, block.shape[0], row.itemsize)
        part = ZERO
        for i in range(block.shape[0]):
            part += exp_close(widen(block[i]) - peak)
        total += float(part)
    return total


@compiled
def _norm(row, best, ahead):
    """Log of the sum of e^(logit - best logit). The others are added up by themselves, so that a norm is as accurate
    where they are next to nothing. The next row, at `ahead`, is asked for meanwhile."""
    peak = widen(row[best])
    others = _sum_exp(row[:best], peak, ahead)
    others += _sum_exp(row[best + 1 :], peak, ahead + (best + 1) * row.itemsize)
    return np.log1p(others)


@compiled
def _count_before(row, target):
    """How many tokens are before the target, by logit, then by id."""
    own = widen(row[target])
    lower, higher = row[:target], row[target:]
    before = np.int32(0)
    for i in range(lower.shape[0]):
        before = np.int32(before + (widen(lower[i]) >= own))
    for i in range(higher.shape[0]):
        before = np.int32(before + (widen(higher[i]) > own))
    return before


@compiled
def _work(call, infinity):
    logits = carray(address(call.logits, infinity), (call.rows, call.vocab))
    targets = carray(address(call.targets, 0), (call.rows,))
    own = carray(address(call.own, ZERO), (call.rows,))
    peaks = carray(address(call.peak, ZERO), (call.rows,))
    norms = carray(address(call.norm, 0.0), (call.rows,))
    best = carray(address(call.best, 0), (call.rows,))
    ranks = carray(address(call.rank, 0), (call.rows,))
    top_ids = carray(address(call.top_ids, 0), (call.rows, call.top))
    top_logits = carray(address(call.top_logits, ZERO), (call.rows, call.top))
    columns, ids, values = take((COLUMNS,), ZERO), take((call.vocab,), 0), take((call.vocab,), ZERO)
    first = LOT * fetch_add(call.counter)
    while first < call.rows:
        for r in range(first, min(first + LOT, call.rows)):
            row = logits[r]
            best[r], finite = find_best(row, infinity)
            peaks[r] = widen(row[best[r]])
            own[r] = widen(row[targets[r]])
            ahead = call.logits + (r + 1) * logits.strides[0]
            norms[r] = _norm(row, best[r], ahead) if finite else np.nan
            ranks[r] = 1 + _count_before(row, targets[r])
            if call.top == 1:
                top_ids[r, 0], top_logits[r, 0] = best[r], peaks[r]
            elif call.top and finite:
                gather_best(row, call.top, columns, ids, values)
                sort_best(ids[: call.top], values[: call.top])
                copy(address_of(ids), address_of(top_ids[r]), call.top, 0)
                copy(address_of(values), address_of(top_logits[r]), call.top, ZERO)
        first = LOT * fetch_add(call.counter)
    give_back(columns)
    give_back(ids)
    give_back(values)


SIGNATURE = types.void(types.CPointer(from_dtype(CALL)))


def score_bfloat16(call):
    _work(carray(call, (1,))[0], np.uint16(0x7F80))


def score_float32(call):
    _work(carray(call, (1,))[0], np.float32(np.inf))
