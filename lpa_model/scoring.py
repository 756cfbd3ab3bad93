"""Windows of texts through a model in this process: many in a forward pass, and never many rows of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

import torch

from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Convention, Tally, Window, own_tokens, windows

T = TypeVar("T")

LOGIT_ROWS = 256  # rows of logits held at a time: the vocabulary times this, in float32, is the peak of scoring
TOKEN_BUDGET = 2048  # tokens of one forward pass, a single longer window excepted
LOOK_AHEAD = 16  # token budgets of windows that are sorted by length before they are scored


def score(
    model: LPAForCausalLM,
    ids: list[int],
    convention: Convention,
    on_window: Callable[[Window], Any] | None = None,
) -> Tally:
    """A text's tally, computed in this process; words and bytes are left to the caller.

    `on_window` is called after each window.

    Raises:
        ValueError: as `windows` and `Tally.add_logprobs`.
    """
    tally = Tally()
    own = own_tokens(ids, convention)
    of_text = ((own, window) for window in windows(len(own), convention))
    for window, logprobs in score_windows(model, of_text):
        tally.add_logprobs(logprobs)
        if on_window is not None:
            on_window(window)
    return tally


def score_windows(
    model: LPAForCausalLM, work: Iterable[tuple[Sequence[int], Window]]
) -> Iterator[tuple[Window, list[float]]]:
    """Each window of (a text's ids, window), in order, with the float32 log-probabilities of its scored tokens."""
    return measure_windows([model], work, _logprobs)


def _logprobs(targets: torch.Tensor, logits: torch.Tensor) -> list[float]:
    found: list[float] = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].tolist()
    return found


def measure_windows(
    models: Sequence[LPAForCausalLM],
    work: Iterable[tuple[Sequence[int], Window]],
    measure: Callable[..., list[T]],
) -> Iterator[tuple[Window, list[T]]]:
    """Each window of (a text's ids, window), in order, with what `measure` finds at each of its scored tokens.

    The windows may be of many texts. Some `LOOK_AHEAD` budgets of them are read before the first is scored, so that
    windows of equal length share forward passes.

    Args:
        models: on one device.
        measure: called as measure(targets, *logits) with the ids of some scored tokens, int64 [rows], and each
            model's logits there, float32 [rows, vocab]; returns a list of `rows` entries. rows <= LOGIT_ROWS.
    """
    group: list[tuple[Sequence[int], Window]] = []
    tokens = 0
    for item in work:
        group.append(item)
        tokens += item[1].length
        if tokens >= LOOK_AHEAD * TOKEN_BUDGET:
            yield from _measure_group(models, group, measure)
            group, tokens = [], 0
    yield from _measure_group(models, group, measure)


def _measure_group(
    models: Sequence[LPAForCausalLM], group: list[tuple[Sequence[int], Window]], measure: Callable[..., list[T]]
) -> Iterator[tuple[Window, list[T]]]:
    found: list[list[T]] = [[] for _ in group]
    by_length = sorted(range(len(group)), key=lambda i: group[i][1].length)
    for length, same in groupby(by_length, key=lambda i: group[i][1].length):
        members = list(same)
        rows = max(1, TOKEN_BUDGET // length)
        for at in range(0, len(members), rows):
            batch = members[at : at + rows]
            for i, entries in zip(batch, _measure_batch(models, [group[i] for i in batch], measure), strict=True):
                found[i] = entries
    for (_, window), entries in zip(group, found, strict=True):
        yield window, entries


@torch.inference_mode()
def _measure_batch(
    models: Sequence[LPAForCausalLM], batch: list[tuple[Sequence[int], Window]], measure: Callable[..., list[T]]
) -> list[list[T]]:
    """Windows of one length through one forward pass of each model."""
    device = models[0].embed_tokens.weight.device
    tokens = torch.tensor([window.tokens(ids) for ids, window in batch], dtype=torch.int64, device=device)
    firsts = [window.first_index for _, window in batch]
    targets = torch.cat([row[first:] for row, first in zip(tokens, firsts, strict=True)])
    states = []
    for model in models:
        hidden = model(tokens[:, :-1])  # [windows, length - 1, d]: the last token predicts nothing that is asked
        states.append(torch.cat([row[first - 1 :] for row, first in zip(hidden, firsts, strict=True)]))
    entries: list[T] = []
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = [model.logits(state[rows]) for model, state in zip(models, states, strict=True)]
        entries += measure(targets[rows], *logits)
    each = iter(entries)
    return [list(islice(each, window.num_scored)) for _, window in batch]
