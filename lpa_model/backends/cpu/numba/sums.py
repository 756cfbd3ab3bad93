"""What becomes of a product's sums, float32 [count, 32]: rows of the result, `stride` bytes apart.

All arguments are addresses and counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from lpa_model.backends.cpu.numba import vectors

ROW = 128  # bytes of sums


def _for_rows(write: Callable[[Any, Any, Any, Any], None]) -> Any:
    """A compiled function (sums, count, out, stride) of what is done to each row: two vectors, and where to."""

    @intrinsic
    def rows(typing: Any, sums: Any, count: Any, out: Any, stride: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, count, out, stride = arguments
            with for_range(builder, count) as loop:
                row = builder.add(sums, builder.mul(loop.index, loop.index.type(ROW)))
                to = builder.add(out, builder.mul(loop.index, stride))
                write(builder, vectors.load(builder, row), vectors.load(builder, row, ROW // 2), to)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), build

    return rows


def _round(builder: Any, left: Any, right: Any, to: Any) -> None:
    vectors.store(builder, vectors.narrow(builder, left), to)
    vectors.store(builder, vectors.narrow(builder, right), to, 32)


def _rectify(builder: Any, left: Any, right: Any, to: Any) -> None:
    zero = vectors.floats(0)
    left, right = (builder.select(builder.fcmp_ordered("<", x, zero), zero, x) for x in (left, right))
    _round(builder, left, right, to)


def _gate(builder: Any, left: Any, right: Any, to: Any) -> None:
    vectors.store(builder, vectors.narrow(builder, builder.fmul(vectors.silu(builder, left), right)), to)


def _add(builder: Any, left: Any, right: Any, to: Any) -> None:
    for i, sums in enumerate((left, right)):  # rounded first, as when they are written down
        before = vectors.load(builder, to, 64 * i)
        vectors.store(builder, builder.fadd(before, vectors.widen(builder, vectors.narrow(builder, sums))), to, 64 * i)


rounded = _for_rows(_round)  # as bfloat16
rectified = _for_rows(_rectify)  # the same without the negative ones
gated = _for_rows(_gate)  # bfloat16 [count, 16]: silu of the left ones times the right ones
added = _for_rows(_add)  # to float32
