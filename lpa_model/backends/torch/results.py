"""From hidden states to a step's result: the head multiplies only needed rows, a bounded number at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends.base import Mask, SamplingRow, Scores, StepResult
from lpa_model.backends.torch.rows import NOTHING
from lpa_model.backends.torch.sampling import TORCH_ROWS, RowOps, sample, score
from lpa_model.batch import Batch, Ints
from lpa_model.config import LPAConfig


class ComputedStep(NamedTuple):
    """A handle: the step's hidden states after the final norm [rows, d], padding rows behind them; and those that
    layers have read, float32 [n, d], of the batch's `hidden` rows. Columns may be padded."""

    batch: Batch
    sampling: Sequence[SamplingRow]
    hidden: Tensor
    inner: Mapping[int, Tensor]


INFINITY, NEGATIVE = 0x7F80, 0x8000  # bits of bfloat16; NaN's are above infinity's
LOGIT_ROWS = 256  # rows of logits held at once, in the head's dtype
FEW_ROWS = 16  # of which more than MANY numbers are wanted of each
MANY = 256


def step_result(
    step: ComputedStep,
    head: Callable[[Tensor], Tensor],
    masks: Mapping[int, Mask],
    config: LPAConfig,
    ops: RowOps = TORCH_ROWS,
) -> StepResult:
    """Sample and score a step; `head` takes some of its rows [n, d] to logits [n, vocab]."""
    batch, sampling, hidden, inner = step
    result = StepResult([None] * len(sampling))
    for layer, wanted in batch.hidden.items():
        states = hidden[_tensor(wanted, hidden)] if layer == config.num_hidden_layers else inner[layer]
        result.hidden[layer] = states[:, : config.hidden_size].float().cpu().numpy()
    _score_rows(hidden, head, batch, ops, result)
    able = [i for i, row in enumerate(sampling) if not row.constrained or i in masks]
    if not able:
        return result
    rows = [sampling[i] for i in able]
    logits = head(hidden[[row.row for row in rows]])
    tokens = sample(logits, rows, [masks.get(i) for i in able], ops)
    broken = _broken_rows(logits)
    for n, (i, token) in enumerate(zip(able, tokens, strict=True)):
        if n in broken:
            result.broken.add(i)
        elif token == NOTHING:
            result.stuck.add(i)
        else:
            result.tokens[i] = token
    if scored := [n for n, row in enumerate(rows) if row.logprobs is not None and result.tokens[able[n]] is not None]:
        targets = torch.tensor([tokens[n] for n in scored], device=logits.device)
        some = logits if len(scored) == len(logits) else logits[scored]
        tops = [rows[n].logprobs or 0 for n in scored]
        columns = score(some, targets, max(tops), ops)
        for at, (n, top) in enumerate(zip(scored, tops, strict=True)):
            result.scores[able[n]] = _part(columns, at, top)
    return result


def _part(scores: Scores, at: int, top: int) -> Scores:
    return Scores(
        [scores.logprobs[at]],
        [scores.ranks[at]],
        [scores.top_ids[at][:top]],
        [scores.top_logprobs[at][:top]],
        [],
        [],
        [],
    )


def _broken_rows(logits: Tensor) -> set[int]:
    """The rows of logits [rows, vocab] that hold a number which is not finite: then their sum is not, either.

    NumPy takes one thread: torch would wake a team of them in every step, for a fraction of what a small product costs.
    """
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        with np.errstate(all="ignore"):
            return set(np.flatnonzero(~np.isfinite(logits.numpy().sum(-1))).tolist())
    if logits.device.type == "cpu" and logits.dtype is torch.bfloat16:
        bits = logits.view(torch.int16).numpy()  # the largest with signs is of positive numbers, without of negative
        broken = (bits.max(-1) >= INFINITY) | (bits.view(np.uint16).max(-1) >= NEGATIVE + INFINITY)
        return set(np.flatnonzero(broken).tolist())
    return set(logits.sum(-1, dtype=torch.float32).isfinite().logical_not().nonzero()[:, 0].tolist())


def _score_rows(
    hidden: Tensor, head: Callable[[Tensor], Tensor], batch: Batch, ops: RowOps, result: StepResult
) -> None:
    columns: tuple[list[Any], ...] = result.prompt_scores
    rows, targets, tops, measured = batch.scored
    at = 0
    for end, wanted in measured or ((len(rows), None),):
        while at < end:
            size = LOGIT_ROWS
            if (wanted is not None and wanted.rows) or tops[at : min(at + size, end)].max() > MANY:
                size = FEW_ROWS
            chunk = slice(at, min(at + size, end))
            logits = head(hidden[_tensor(rows[chunk], hidden)])
            result.broken_prompt.update(at + row for row in _broken_rows(logits))
            found: tuple[list[Any], ...] = score(
                logits, _tensor(targets[chunk], hidden), int(tops[chunk].max()), ops, wanted
            )
            for column, more in zip(columns, found, strict=True):
                column.extend(more)
            at = chunk.stop


def _tensor(ids: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(ids).to(like.device)
