"""A step's tokens and scores, computed on the device: everything goes there in one copy and comes back in one.

Definitions, their order and the random numbers are those of `lpa_model.backends.torch.sampling`. Only a row whose
random numbers were not enough, which a low top_p can do, costs a second turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.backends.base import Floats, Mask, SamplingRow, Scores, StepResult
from lpa_model.backends.cuda import logits as ops
from lpa_model.backends.cuda.transfer import Fetch, Parcel
from lpa_model.backends.torch.rows import NOTHING, UNDECIDED, RowScores
from lpa_model.backends.torch.sampling import MORE_NUMBERS, settings_of
from lpa_model.batch import Batch, Ints, Measured, ScoredRows

ATTEMPTS = 3  # random numbers of a row with top_p: all but one in thousands need no more at a top_p of 0.9
LOGIT_ROWS = 256  # rows of logits held at once
FEW_ROWS = 16  # of which more than MANY numbers are wanted of each
MANY = 256

Head = Callable[[Tensor], Tensor]
"""Rows of the batch (int64 [n]) -> their logits [n, vocab] in the head's dtype."""


@dataclass
class Sampled:
    """Rows whose tokens and scores are on their way: columns of float64 [n, 2 + ...], whose whole numbers are exact."""

    able: Sequence[int]  # their indices into the step's sampling rows
    rows: Sequence[SamplingRow]
    masks: Sequence[Mask | None]
    scored: Sequence[int]  # indices into `rows`
    top: int
    tokens: Tensor  # [n], on the device
    columns: Fetch
    attempts: int


class _Kind(NamedTuple):
    """Rows that are drawn in the same way."""

    rows: list[int]
    place: int  # of their numbers in the parcel
    settings: int
    most: int | None  # the largest top_k


def sample(
    head: Head,
    able: Sequence[int],
    rows: Sequence[SamplingRow],
    masks: Sequence[Mask | None],
    vocab: int,
    device: torch.device,
    attempts: int = ATTEMPTS,
) -> Sampled:
    """Begin to draw a token for each row, at least one, and to score it where that is wanted; nothing waits."""
    parcel = Parcel()
    at_rows = parcel.add(np.array([row.row for row in rows], np.int64))
    steer = _steering(rows, masks, vocab, parcel)
    kinds = _kinds(rows, attempts, parcel)
    scored = [i for i, row in enumerate(rows) if row.logprobs is not None]
    at_scored = parcel.add(np.array(scored, np.int64))
    there = parcel.send(device)

    logits = head(there[at_rows])
    steered = logits.to(torch.float32, copy=True) if steer.any else logits.float()
    steer(steered, there)
    greedy, _ = ops.draw_greedy(steered)
    tokens = greedy
    for kind in kinds:
        chosen = there[kind.place]
        some = steered if len(kind.rows) == len(rows) else steered[chosen]
        tokens = tokens.index_copy(0, chosen, ops.draw_tokens(some, there[kind.settings], kind.most))
    columns = [torch.stack((tokens, ops.broken(logits)), 1).double().view(-1)]
    top = min(max((rows[i].logprobs or 0 for i in scored), default=0), vocab)
    if scored:
        whole = len(scored) == len(rows)
        some, targets = (logits, tokens) if whole else (logits[there[at_scored]], tokens[there[at_scored]])
        columns.append(_columns(ops.row_scores(some, targets.clamp_min(0), top)).view(-1))
    return Sampled(able, rows, masks, scored, top, tokens, Fetch(torch.cat(columns)), attempts)


def finish(sampled: Sampled, head: Head, vocab: int, device: torch.device, result: StepResult) -> None:
    """Wait for sampled rows and put them into the result; rows without enough random numbers are drawn again."""
    while undecided := take(sampled, result):
        result.redrawn.update(sampled.able[i] for i in undecided)
        sampled = sample(
            head,
            [sampled.able[i] for i in undecided],
            [sampled.rows[i] for i in undecided],
            [sampled.masks[i] for i in undecided],
            vocab,
            device,
            sampled.attempts * MORE_NUMBERS,
        )


def take(sampled: Sampled, result: StepResult) -> list[int]:
    """Put what has arrived into the result; the rows that need more random numbers."""
    n, width = len(sampled.rows), 2 + 2 * sampled.top
    numbers = sampled.columns.result()
    scores = numbers[2 * n :].reshape(len(sampled.scored), width) if sampled.scored else None
    undecided = []
    drawn = numbers[: 2 * n].reshape(n, 2)
    if n == len(result.tokens) and scores is None and not drawn[:, 1].any() and drawn[:, 0].min() >= 0:
        result.tokens = drawn[:, 0].astype(np.int64).tolist()
        return []
    for i, (token, is_broken) in enumerate(drawn.astype(np.int64).tolist()):
        if is_broken:
            result.broken.add(sampled.able[i])
        elif token == NOTHING:
            result.stuck.add(sampled.able[i])
        elif token == UNDECIDED:
            undecided.append(i)
        else:
            result.tokens[sampled.able[i]] = token
    if scores is not None:
        for i, one in zip(sampled.scored, scores[:, None], strict=True):
            if result.tokens[sampled.able[i]] is not None:
                columns = _lists(one, sampled.top, sampled.rows[i].logprobs or 0)
                result.scores[sampled.able[i]] = Scores(*columns, [], [], [])
    return undecided


@dataclass
class ScoredChunk:
    """Scored rows on their way: float64 columns [n, 2 + 2 top + 1 (broken) + those of `wanted`]."""

    top: int
    wanted: Measured | None
    columns: Tensor
    all_logprobs: Floats | None  # [n, vocab]


@dataclass
class ScoredStep:
    """All scored rows of a step on their way."""

    chunks: list[ScoredChunk] = field(default_factory=list)
    columns: Fetch | None = None


def score_prompt(head: Head, batch: Batch, device: torch.device) -> ScoredStep:
    """Begin to score the batch's rows, a bounded number of logits at once. Nothing waits but for rows whose whole
    distributions are wanted: these leave the device chunk by chunk."""
    step, scored = ScoredStep(), batch.scored
    if not len(scored.rows):
        return step
    parcel = Parcel()
    at_rows, at_targets = parcel.add(scored.rows), parcel.add(scored.targets)
    masses = {id(w.mass_of): parcel.add(w.mass_of) for _, w in scored.measured if w.mass_of is not None}
    there = parcel.send(device)
    for chunk, top, wanted in _chunks(scored):
        logits = head(there[at_rows][chunk])
        top = min(top, logits.shape[1])
        found = ops.row_scores(logits, there[at_targets][chunk], top)
        columns = [_columns(found), ops.broken(logits).double()[:, None]]
        if wanted is not None and wanted.entropy:
            columns.append(ops.entropies(logits, found)[:, None])
        if wanted is not None and wanted.mass_of is not None:
            columns.append(ops.log_masses(logits, found, there[masses[id(wanted.mass_of)]])[:, None])
        rows = _logprobs(logits, found).cpu().numpy() if wanted is not None and wanted.rows else None
        step.chunks.append(ScoredChunk(top, wanted, torch.cat(columns, 1), rows))
    step.columns = Fetch(torch.cat([chunk.columns.view(-1) for chunk in step.chunks]))
    return step


def take_scores(step: ScoredStep, result: StepResult) -> None:
    """Wait for a step's scored rows and put them into the result."""
    if step.columns is None:
        return
    numbers, at, done = step.columns.result(), 0, 0
    columns: tuple[list[Any], ...] = result.prompt_scores
    for top, wanted, tensor, rows in ((c.top, c.wanted, c.columns, c.all_logprobs) for c in step.chunks):
        n, width = tensor.shape
        found, at = numbers[at : at + n * width].reshape(n, width), at + n * width
        after = 2 + 2 * top
        result.broken_prompt.update((done + np.flatnonzero(found[:, after])).tolist())
        parts: list[list[Any]] = [*_lists(found, top, top)]
        if wanted is not None:
            parts.append(found[:, after + 1].tolist() if wanted.entropy else [math.nan] * n)
            parts.append(found[:, -1].tolist() if wanted.mass_of is not None else [math.nan] * n)
            parts.append([None] * n if rows is None else list(rows))
        for column, more in zip(columns, parts, strict=False):
            column.extend(more)
        done += n


def _chunks(scored: ScoredRows) -> list[tuple[slice, int, Measured | None]]:
    """Rows to be scored together, the longest list of best tokens among them, and what else is measured of them."""
    chunks: list[tuple[slice, int, Measured | None]] = []
    at = 0
    runs: Sequence[tuple[int, Measured | None]] = scored.measured or ((len(scored.rows), None),)
    for end, wanted in runs:
        while at < end:
            size = LOGIT_ROWS
            if (wanted is not None and wanted.rows) or scored.top[at : min(at + size, end)].max() > MANY:
                size = FEW_ROWS
            stop = min(at + size, end)
            chunks.append((slice(at, stop), int(scored.top[at:stop].max()), wanted))
            at = stop
    return chunks


def _columns(found: RowScores) -> Tensor:
    """float64 [n, 2 + 2 top]: the target's log-probability and rank, the best ids, their log-probabilities."""
    own = _logprobs(found.own[:, None], found)
    return torch.cat((own, found.rank[:, None], found.top_ids, _logprobs(found.top_logits, found)), 1).double()


def _logprobs(logits: Tensor, rows: RowScores) -> Tensor:
    """Some of each row's logits [rows, n] -> float64, rounded to float32."""
    return (logits.double() - rows.peak[:, None] - rows.norm[:, None]).float().double()


def _lists(columns: NDArray[np.float64], top: int, wanted: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The first columns of `Scores`, with `wanted` of the `top` best tokens."""
    ids, logprobs = columns[:, 2 : 2 + top], columns[:, 2 + top : 2 + 2 * top]
    return (
        columns[:, 0].tolist(),
        columns[:, 1].astype(np.int64).tolist(),
        ids[:, :wanted].astype(np.int64).tolist(),
        logprobs[:, :wanted].tolist(),
    )


def _kinds(rows: Sequence[SamplingRow], attempts: int, parcel: Parcel) -> list[_Kind]:
    """Rows with a temperature: those without a top_k, and those with one."""
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    kinds = []
    for members in ([i for i in drawn if not rows[i].top_k], [i for i in drawn if rows[i].top_k]):
        if members:
            several = any(rows[i].top_p != 1 for i in members)
            settings = [settings_of(rows[i], attempts if several else 1) for i in members]
            most = max(rows[i].top_k for i in members) or None
            place = parcel.add(np.array(members, np.int64))
            kinds.append(_Kind(members, place, parcel.add(np.array(settings, np.float64)), most))
    return kinds


class _Steering:
    """What is done to a step's float32 logits before tokens are drawn; its arrays are in the parcel."""

    def __init__(self) -> None:
        self.masks: tuple[int, int] | None = None  # rows, bytes
        self.allowed: tuple[int, int] | None = None  # rows, places in the flat logits
        self.banned: int | None = None
        self.bias: tuple[int, int] | None = None
        self.seen: tuple[int, int] | None = None  # places; counts and penalties, float32 [4, n]

    @property
    def any(self) -> bool:
        return any(part is not None for part in vars(self).values())

    def __call__(self, logits: Tensor, there: Sequence[Tensor]) -> None:
        """Changes contiguous float32 [n, vocab]."""
        flat = logits.view(-1)
        if self.masks is not None:
            rows, packed = (there[i] for i in self.masks)
            bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
            forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
            logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill(forbidden, -torch.inf))
        if self.allowed is not None:
            rows, places = (there[i] for i in self.allowed)
            kept = flat.index_select(0, places)
            logits.index_fill_(0, rows, -torch.inf)
            flat.index_copy_(0, places, kept)
        if self.banned is not None:
            flat.index_fill_(0, there[self.banned], -torch.inf)
        if self.bias is not None:
            places, bias = (there[i] for i in self.bias)
            flat.index_copy_(0, places, flat.index_select(0, places) + bias)
        if self.seen is not None:
            places, (counts, repetition, frequency, presence) = (there[i] for i in self.seen)
            values = flat.index_select(0, places)
            values = torch.where(values > 0, values / repetition, values * repetition)
            values = values - counts * frequency - (counts > 0) * presence
            flat.index_copy_(0, places, values)


def _steering(rows: Sequence[SamplingRow], masks: Sequence[Mask | None], vocab: int, parcel: Parcel) -> _Steering:
    steer = _Steering()

    def places(ids: Sequence[tuple[int, Any]]) -> Ints:
        return np.concatenate([i * vocab + np.asarray(some, np.int64) for i, some in ids])

    if masked := [(i, mask) for i, mask in enumerate(masks) if mask is not None]:
        packed = np.stack([mask[: -(-vocab // 8)] for _, mask in masked])
        steer.masks = parcel.add(np.array([i for i, _ in masked], np.int64)), parcel.add(packed)
    if allowed := [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]:
        steer.allowed = parcel.add(np.array([i for i, _ in allowed], np.int64)), parcel.add(places(allowed))
    if banned := [(i, row.banned) for i, row in enumerate(rows) if row.banned]:
        steer.banned = parcel.add(places(banned))
    if biased := [(i, row.bias_ids) for i, row in enumerate(rows) if row.bias_ids is not None]:
        bias = np.concatenate([row.bias for row in rows if row.bias is not None])
        steer.bias = parcel.add(places(biased)), parcel.add(bias.astype(np.float32))
    if seen := [(i, row) for i, row in enumerate(rows) if row.seen is not None]:
        numbers = []
        for _, row in seen:
            assert row.seen is not None and row.counts is not None
            penalties = (row.repetition_penalty, row.frequency_penalty, row.presence_penalty)
            spread = np.repeat(np.array([penalties], np.float32), len(row.seen), 0)
            numbers.append(np.column_stack((row.counts.astype(np.float32), spread)))
        steer.seen = parcel.add(places([(i, row.seen) for i, row in seen])), parcel.add(np.concatenate(numbers).T)
    return steer
