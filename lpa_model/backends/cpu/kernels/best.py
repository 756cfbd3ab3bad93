"""The k best tokens of a row of logits, as machine code: by logit, then by lower id. The row holds no NaN."""

from __future__ import annotations

import numpy as np

from lpa_model.backends.cpu.kernels.machine import address_of, compiled, fill, order, widen

COLUMNS = 1024
BLOCK = 128  # logits that are looked through at a time for what is rare


@compiled
def _kth(values, k):
    """The order of the k-th largest of some numbers."""
    low, high = np.int64(order(np.float32(-np.inf))), np.int64(order(np.float32(np.inf)))
    while low < high:  # the answer is between them
        middle = np.int32((low + high + 1) >> 1)
        count = np.int32(0)
        for i in range(values.shape[0]):
            count = np.int32(count + (order(values[i]) >= middle))
        if count >= k:
            low = np.int64(middle)
        else:
            high = np.int64(middle) - 1
    return np.int32(low)


@compiled
def _lower_bound(row, k, columns):
    """Order of a number that k of the row's logits reach: each of k columns of the row has one."""
    columns = columns[: min(COLUMNS, row.shape[0])]
    if k > columns.shape[0]:
        return order(np.float32(-np.inf))
    fill(address_of(columns), len(columns), np.float32(-np.inf))
    for start in range(0, row.shape[0], COLUMNS):
        part = row[start : start + COLUMNS]
        for i in range(part.shape[0]):
            columns[i] = max(columns[i], widen(part[i]))
    return _kth(columns, k)


@compiled
def _gather(row, bound, equals, ids, values):
    """Ids and logits above a bound, and of `equals` at it, by id; returns how many. The bound is an order."""
    found = 0
    for start in range(0, row.shape[0], BLOCK):
        block = row[start : start + BLOCK]
        reached = np.int32(0)
        for i in range(block.shape[0]):
            reached = np.int32(reached + (order(widen(block[i])) >= bound))
        if not reached:
            continue
        for i in range(block.shape[0]):
            key = order(widen(block[i]))
            if key == bound:
                equals -= 1
            if key > bound or (key == bound and equals >= 0):
                ids[found], values[found] = start + i, widen(block[i])
                found += 1
    return found


@compiled
def gather_best(row, k, columns, ids, values):
    """The k best tokens in the order of their ids, and their logits: into ids[:k], values[:k].

    Scratch: columns float32 [COLUMNS], ids int64 and values float32 of the row's length.
    """
    found = _gather(row, _lower_bound(row, k, columns), row.shape[0], ids, values)
    kth = _kth(values[:found], k)
    above = 0
    for i in range(found):
        above += order(values[i]) > kth
    left, equals = 0, k - above
    for i in range(found):
        key = order(values[i])
        if key == kth:
            equals -= 1
        if key > kth or (key == kth and equals >= 0):
            ids[left], values[left] = ids[i], values[i]
            left += 1


@compiled
def sort_best(ids, values):
    """Best first; of equal ones those stay first that are."""
    for i in range(1, ids.shape[0]):
        token, value = ids[i], values[i]
        at = i
        while at > 0 and values[at - 1] < value:
            ids[at], values[at] = ids[at - 1], values[at - 1]
            at -= 1
        ids[at], values[at] = token, value
