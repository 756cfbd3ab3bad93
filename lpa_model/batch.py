"""One step as arrays: token ids, positions and cache slots of the rows, and the spans of requests that they are.

Everything is numpy and made before the forward pass; every backend reads the same description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NO_INTS: Ints = np.zeros(0, dtype=np.int64)


class Span(NamedTuple):
    """Tokens of one request in a step: `length` new ones after `context` tokens that are in the cache."""

    context: int
    length: int
    block_table: Sequence[int]  # covers context + length tokens
    decode: bool  # generated token (length 1) or prompt
    branches: tuple[
        int, ...
    ] = ()  # first tokens of continuations, each of which attends to itself and the shared prefix

    def positions(self) -> Ints:
        """[context + length]: every branch continues at the end of the shared prefix."""
        index = np.arange(self.context + self.length)
        if not self.branches:
            return index
        return index - self._branch_starts(index) + np.minimum(index, self.branches[0])

    def mask(self) -> NDArray[np.bool_]:
        """[length, context + length]: which tokens each new one sees."""
        index = np.arange(self.context + self.length)
        new = index[self.context :, None]
        visible: NDArray[np.bool_] = index <= new
        if self.branches:
            starts = self._branch_starts(index)
            visible &= (index < self.branches[0]) | (starts == starts[self.context :, None])
        return visible

    def masked_range(self) -> tuple[Ints, Ints]:
        """(starts, ends) [length]: each new token sees all tokens before it except these."""
        index = np.arange(self.context, self.context + self.length)
        if not self.is_branched:
            return index, index
        starts = np.minimum(index, self.branches[0])
        return starts, np.where(index < self.branches[0], index, self._branch_starts(index))

    def slots(self, block_size: int) -> Ints:
        """[length]: block * block_size + offset of each new token."""
        index = np.arange(self.context, self.context + self.length)
        return np.asarray(self.block_table, dtype=np.int64)[index // block_size] * block_size + index % block_size

    def _branch_starts(self, index: Ints) -> Ints:
        """Where the branch of each token begins; for the shared prefix the token itself."""
        branch = np.searchsorted(self.branches, index, side="right") - 1
        return np.where(branch < 0, index, np.asarray(self.branches)[branch])

    @property
    def is_branched(self) -> bool:
        """Whether tokens of branches are among the new ones."""
        return bool(self.branches) and self.context + self.length > self.branches[0]

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        """Prompt spans of one shape can be attended together."""
        return self.context, self.length, self.branches if self.is_branched else ()


class Measured(NamedTuple):
    """What is wanted of a row's whole distribution, beside the log-probability of its target."""

    entropy: bool = False
    mass_of: Ints | None = None  # ids of tokens whose common probability is wanted
    rows: bool = False  # the log-probabilities of all tokens, by id


NOT_MEASURED = Measured()


class ScoredRows(NamedTuple):
    """Rows whose next token's log-probability is wanted."""

    rows: Ints  # [n], of the batch
    targets: Ints  # [n] token ids
    top: Ints  # [n]: how many of the most probable tokens are wanted beside it
    measured: Sequence[tuple[int, Measured]] = ()  # runs of scored rows, each with the one after its last; or none


NO_SCORES = ScoredRows(NO_INTS, NO_INTS, NO_INTS)


@dataclass(frozen=True)
class Batch:
    """The rows of a step, flat: decode rows first (one per span), then prompt rows, span after span."""

    ids: Ints  # [rows] token ids
    spans: Sequence[Span]
    block_size: int
    positions: Ints  # [rows]
    slots: Ints  # [rows]: block * block_size + offset, where the row's keys and values are written
    num_decode: int
    scored: ScoredRows
    zero_blocks: Ints  # newly allocated blocks that this step does not fill: cleared before anything is written
    hidden: Mapping[int, Ints] = field(default_factory=dict)  # layer -> rows whose hidden states are wanted, ascending
    # [rows]: which sampling row of the step submitted before gives the row's id, whatever `ids` has; -1: none
    carried: Ints | None = None  # None: none of any row

    @classmethod
    def build(
        cls,
        ids: Sequence[int] | Ints,
        spans: Sequence[Span],
        block_size: int,
        *,
        scored: ScoredRows = NO_SCORES,
        zero_blocks: Sequence[int] | Ints = (),
        hidden: Mapping[int, Ints] = MappingProxyType({}),
        carried: Ints | None = None,
    ) -> Batch:
        """Lay out `spans`, decode spans first; `ids` are their new tokens in order.

        `hidden`: rows by the layer that reads them, from 0; of the number of layers, those after the final norm.
        """
        num_decode = sum(span.decode for span in spans)
        decodes = spans[:num_decode]
        assert all(span.decode and span.length == 1 for span in decodes), "decode spans come first, one token each"
        assert len(ids) == sum(span.length for span in spans)
        # as plain numbers: a step has hundreds of these spans, and an array for each would take longer than a GPU
        assert not any(span.branches for span in decodes), "what branches is scored, not generated"
        at = [(span.context, span.block_table[span.context // block_size]) for span in decodes]
        positions = np.array([context for context, _ in at], dtype=np.int64)
        slots = np.array([block * block_size + context % block_size for context, block in at], dtype=np.int64)
        prompts = spans[num_decode:]
        return cls(
            ids=np.asarray(ids, dtype=np.int64),
            spans=spans,
            block_size=block_size,
            positions=np.concatenate([positions, *(span.positions()[span.context :] for span in prompts)]),
            slots=np.concatenate([slots, *(span.slots(block_size) for span in prompts)]),
            num_decode=num_decode,
            scored=scored,
            zero_blocks=np.asarray(zero_blocks, dtype=np.int64),
            hidden=hidden,
            carried=carried,
        )

    @property
    def num_rows(self) -> int:
        """Decode and prompt rows together."""
        return len(self.ids)

    @property
    def prompts(self) -> Sequence[Span]:
        """The spans of the prompt rows."""
        return self.spans[self.num_decode :]

    def cut(self, most: int) -> Iterator[Batch]:
        """The same rows in order, at most `most` at a time; without scores and blocks to clear."""
        assert self.carried is None
        spans: list[Span] = []
        done, left = 0, most

        def part(end: int) -> Batch:
            hidden = {layer: rows[(rows >= done) & (rows < end)] - done for layer, rows in self.hidden.items()}
            return Batch.build(self.ids[done:end], spans, self.block_size, hidden=hidden)

        for span in self.spans:
            while span.length > left:
                if left:
                    spans.append(span._replace(length=left))
                    span = span._replace(context=span.context + left, length=span.length - left)
                yield part(done + most)
                done, spans, left = done + most, [], most
            spans.append(span)
            left -= span.length
        yield part(self.num_rows)
