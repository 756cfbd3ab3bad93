"""Hidden states of a prompt: which ones a request wants, and those that its steps have given so far. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HiddenSpec:
    """Which hidden states of a prompt are wanted.

    Layer i is what layer i reads, counted from 0, which reads the embeddings; the number of layers stands for what the
    output head reads, after the final norm.
    """

    layers: tuple[int, ...]
    positions: Sequence[int]  # ascending, at least one
    mean: bool = False  # only the mean over the positions

    def within(self, start: int, end: int) -> Sequence[int]:
        """Those of the positions that are in [start, end)."""
        return self.positions[bisect_left(self.positions, start) : bisect_left(self.positions, end)]


class HiddenStates:
    """What a request wants, filled step by step. Its numbers do not depend on where steps were cut, to the bit."""

    def __init__(self, spec: HiddenSpec) -> None:
        self.spec = spec
        self._rows: Floats | None = None  # [positions, layers, d], of which `_count` are there
        self._sum: npt.NDArray[np.float64] | None = None  # [layers, d]
        self._count = 0

    def add(self, rows: Floats) -> None:
        """The next positions' rows [n, layers, d]."""
        if self.spec.mean:
            # one row after the other: a sum over axis 0 begins with the first and adds the others in order
            terms = rows.astype(np.float64)
            if self._sum is not None:
                terms = np.concatenate((self._sum[None], terms))
            self._sum = np.add.reduce(terms, axis=0)
        else:
            if self._rows is None:
                self._rows = np.empty((len(self.spec.positions), *rows.shape[1:]), dtype=np.float32)
            self._rows[self._count : self._count + len(rows)] = rows
        self._count += len(rows)

    def clear(self) -> None:
        """The prompt will be computed anew."""
        self._rows, self._sum, self._count = None, None, 0

    def result(self) -> Floats:
        """[positions, layers, d], or [1, layers, d] of the mean; all must be there."""
        assert self._count == len(self.spec.positions)
        if self._sum is not None:
            return (self._sum / self._count).astype(np.float32)[None]
        assert self._rows is not None
        return self._rows
