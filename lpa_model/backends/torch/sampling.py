"""From logits to tokens and log-probabilities: pure functions of the logits and one row of parameters each.

The order is vLLM's: grammar, allowed tokens, bans (bad words, min_tokens) and logit bias; repetition, then frequency
and presence penalties; temperature; min_p; top_k; top_p. A forbidden token has the logit -inf from its step on,
so that no bias brings it back. If nothing is left, the row has no token. Log-probabilities are scored from the
untouched logits.

top_k keeps exactly k tokens, of equal ones those of lower id. top_p keeps a token if those strictly more probable have
less than top_p of the mass that min_p and top_k left. Nothing is sorted for it: a token is drawn from all and taken if
it is among the kept ones; if not, neither is anything less probable, and the next one is drawn from the rest.

Random numbers are stateless: hashes of (seed, choice, position, attempt), so that neither batching nor preemption
changes what is drawn. A row's result depends on its own logits and parameters alone, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends.base import Floats, Mask, SamplingRow, Scores
from lpa_model.backends.torch import rows as torch_rows
from lpa_model.backends.torch.rows import UNDECIDED, RowScores
from lpa_model.batch import Ints, Measured


class RowOps(NamedTuple):
    """What passes over whole rows of logits, by torch or by kernels; see `rows` for the definitions."""

    draw_tokens: Callable[[Tensor, Tensor], Tensor]
    row_scores: Callable[[Tensor, Tensor, int], RowScores]
    copy_allowed: Callable[[Tensor, Sequence[Mask | None]], Tensor]


TORCH_ROWS = RowOps(torch_rows.draw_tokens, torch_rows.row_scores, torch_rows.copy_allowed)
NUMBERS = 2  # at first; a top_p of 0.9 needs more once in 200 draws
MORE_NUMBERS = 4  # times as many as were not enough
LISTED = 1 << 16  # numbers that become a list at once, in about a millisecond


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], masks: Sequence[Mask | None], ops: RowOps = TORCH_ROWS
) -> list[int]:
    """One token per row of logits [rows, vocab]: greedy at temperature 0, else by inverse distribution; NOTHING where
    everything is forbidden.

    `masks` are the rows' grammar masks. Logits that are not float32 are taken as such.
    """
    return _draw(_penalize(_constrain(logits, rows, masks, ops), logits, rows, ops), rows, ops)


def _draw(logits: Tensor, rows: Sequence[SamplingRow], ops: RowOps) -> list[int]:
    """What `draw_tokens` says of the rows, with as many random numbers as it takes."""
    tokens = [UNDECIDED] * len(rows)
    pending, numbers = list(range(len(rows))), NUMBERS
    while pending:
        settings = torch.tensor([settings_of(rows[i], numbers) for i in pending], dtype=torch.float64)
        some = logits if len(pending) == len(rows) else logits[pending]
        found = ops.draw_tokens(some, settings.to(logits.device))
        for i, token in zip(pending, found.tolist(), strict=True):
            tokens[i] = token
        pending = [i for i in pending if tokens[i] == UNDECIDED]
        numbers *= MORE_NUMBERS
    return tokens


def settings_of(row: SamplingRow, numbers: int) -> tuple[float, ...]:
    """The row of `draw_tokens`'s settings: temperature, top_k, top_p, min_p and as many numbers."""
    needed = 0 if row.temperature == 0 else 1 if row.top_p == 1 else numbers
    random = [*map(row.draws, range(needed)), *[0.0] * (numbers - needed)]
    return row.temperature, row.top_k, row.top_p, row.min_p, *random


def _constrain(logits: Tensor, rows: Sequence[SamplingRow], masks: Sequence[Mask | None], ops: RowOps) -> Tensor:
    """-inf for what the grammar, allowed_token_ids or bans forbid, then the bias; a float32 copy if there is any."""
    allowed = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    banned = [(i, np.asarray(row.banned, np.int64)) for i, row in enumerate(rows) if row.banned]
    biased = [(i, row.bias_ids) for i, row in enumerate(rows) if row.bias_ids is not None]
    if not (allowed or banned or biased or any(mask is not None for mask in masks)):
        return logits
    logits = ops.copy_allowed(logits, masks)
    flat = logits.view(-1)
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
    return logits


def _penalize(steered: Tensor, logits: Tensor, rows: Sequence[SamplingRow], ops: RowOps) -> Tensor:
    """Penalties at the tokens seen: repetition divides positive logits and multiplies negative ones; what was
    generated loses frequency_penalty for each time and presence_penalty once."""
    seen = [(i, row.seen) for i, row in enumerate(rows) if row.seen is not None]
    if not seen:
        return steered
    if steered is logits:
        steered = ops.copy_allowed(logits, [None] * len(rows))

    def spread(values: list[float]) -> Tensor:
        repeated = np.repeat(np.array(values, np.float32), [len(ids) for _, ids in seen])
        return torch.from_numpy(repeated).to(logits.device)

    params = [rows[i] for i, _ in seen]
    counts = torch.from_numpy(np.concatenate([row.counts for row in rows if row.counts is not None])).to(logits.device)
    repetition = spread([p.repetition_penalty for p in params])
    index, flat = _flat_index(seen, logits), steered.view(-1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * spread([p.frequency_penalty for p in params])
    values -= (counts > 0) * spread([p.presence_penalty for p in params])
    flat[index] = values
    return steered


def _flat_index(ids: Sequence[tuple[int, Ints]], logits: Tensor) -> Tensor:
    """Positions in logits.view(-1) of (row, token ids) pairs: int64 [sum of lengths]."""
    return torch.from_numpy(np.concatenate([row * logits.shape[1] + tokens for row, tokens in ids])).to(logits.device)


def score(
    logits: Tensor, targets: Tensor, top: int, ops: RowOps = TORCH_ROWS, measured: Measured | None = None
) -> Scores:
    """Log-probabilities of `targets` (int64 [rows]) under logits [rows, vocab], with the `top` best tokens and what
    else is to be measured.

    Logits that are not float32 are taken as such, a few rows at a time. The target's number is the very one in the
    list of the best when it is among them, and does not depend on `top`. Ties are broken towards the lower id, in
    `rank` and in the list.
    """
    top = min(top, logits.shape[1])
    found = ops.row_scores(logits, targets, top)
    if top > 1 and len(odd := found.norm.isnan().nonzero()[:, 0]):  # kernels leave such rows' lists open
        found.top_logits[odd], found.top_ids[odd] = torch_rows.best_tokens(logits[odd].float(), top)
    return Scores(
        _logprobs(found.own[:, None], found)[:, 0].tolist(),
        found.rank.tolist(),
        _lists(found.top_ids),
        _lists(_logprobs(found.top_logits, found)),
        *_measure(logits, found, measured),
    )


def _lists(rows: Tensor) -> list[Any]:
    """`rows.tolist()`, but other threads run between its parts: a million numbers at once would block them."""
    most = max(1, LISTED // max(1, rows.shape[1]))
    return [row for few in rows.split(most) for row in few.tolist()]


def _measure(
    logits: Tensor, found: RowScores, wanted: Measured | None
) -> tuple[list[float], list[float], list[Floats | None]]:
    """The last columns of `Scores`; all empty for None."""
    if wanted is None:
        return [], [], []
    entropies = masses = [math.nan] * len(logits)
    rows: list[Floats | None] = [None] * len(logits)
    if wanted.entropy:
        entropies = torch_rows.entropies(logits, found.peak, found.norm).tolist()
    if wanted.mass_of is not None:
        ids = torch.from_numpy(wanted.mass_of).to(logits.device)
        masses = (torch_rows.log_masses(logits, found.peak, ids) - found.norm).tolist()
    if wanted.rows:
        rows = list(_logprobs(logits, found).cpu().numpy())
    return entropies, masses, rows


def _logprobs(logits: Tensor, rows: RowScores) -> Tensor:
    """Some of each row's logits [rows, n] -> float32."""
    return (logits.double() - rows.peak[:, None] - rows.norm[:, None]).float()
