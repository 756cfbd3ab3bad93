"""What an error of each projection's output costs, from one backward pass: the other side of K-FAC, as LEMS uses it.

With labels drawn from the model's own distribution, G = E[g g^T] of the gradients g of a text's log-probability with
respect to a projection's output is that output's part of the Fisher information: to second order, an error e of the
output moves the model's distribution by e^T G e / 2 nats (KL) per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpa_model.config import Projection
from lpa_model.convert.lowrank.calibrate import SINKS, Moment, embed, projection_of
from lpa_model.model import LPAForCausalLM

ROWS = 256
"""Rows of logits held at a time."""
WIDEST = 1024
"""Of a wider output only the mean of the squares is kept: the moments of every layer are held at once."""

SHORT = 256
"""Tokens of a window that goes forwards and back: the peak of memory."""
TOKENS = 8192
"""Tokens that gradients are taken on."""

Key = tuple[int, Projection]
Gradients = tuple[Tensor, ...] | Tensor
"""As torch has their type; hooks of modules get tuples."""


def short(windows: Tensor, tokens: int = TOKENS) -> Tensor:
    """Windows of SHORT tokens, up to `tokens` in all, from [windows, T]: parts of them, evenly spaced."""
    length = min(SHORT, windows.shape[1])
    parts = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    count = max(1, min(len(parts), tokens // length))
    return parts[torch.linspace(0, len(parts) - 1, count).long()]


def output_moments(
    model: LPAForCausalLM,
    windows: Tensor,
    wanted: Sequence[Projection],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, Tensor]:
    """E[g g^T] [out, out] of every wanted projection of every layer, float64; its mean diagonal [] where out > WIDEST.

    windows: token ids int64 [windows, T]; one at a time goes forwards and back.
    """
    found: dict[Key, Moment] = {}
    handles = []
    for layer, block in enumerate(model.layers):
        for name in wanted:
            width = model.config.projection_sizes(name)[1]
            moment = found[layer, name] = Moment(width if width <= WIDEST else 1)
            handles.append(projection_of(block, name).register_full_backward_hook(_adding(moment)))
    _backwards(model, windows, handles, progress)
    return {key: moment.mean() if len(moment.lower) > 1 else moment.mean()[0, 0] for key, moment in found.items()}


def output_squares(model: LPAForCausalLM, windows: Tensor) -> dict[str, Tensor]:
    """E[g^2] [out] of every linear layer before the head, by its name, float64; windows as above."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.layers.named_modules(prefix="layers"):
        if isinstance(layer, nn.Linear):
            found[name] = torch.zeros(layer.out_features, dtype=torch.float64)
            handles.append(layer.register_full_backward_hook(_adding_squares(found[name])))
    _backwards(model, windows, handles)
    count = len(windows) * max(1, windows.shape[1] - SINKS)
    return {name: total / count for name, total in found.items()}


def _adding_squares(total: Tensor) -> Callable[[nn.Module, Gradients, Gradients], None]:
    def hook(_: nn.Module, __: Gradients, gradients: Gradients) -> None:
        assert isinstance(gradients, tuple)
        total.add_(gradients[0][:, SINKS:].flatten(0, 1).double().square().sum(0))

    return hook


def _backwards(
    model: LPAForCausalLM,
    windows: Tensor,
    handles: Sequence[RemovableHandle],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Each window forwards and back, under hooks that are removed then."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    try:
        for done, ids in enumerate(windows):
            with torch.enable_grad():
                stream = embed(model, ids[None]).requires_grad_(True)
                hidden = stream
                for block in model.layers:
                    hidden = block(hidden, model.rotary, None)
                states = hidden[0] if model.norm is None else model.norm(hidden)[0]
            states.backward(_gradient(model, states.detach(), generator))
            progress(done + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()


def _adding(moment: Moment) -> Callable[[nn.Module, Gradients, Gradients], None]:
    def hook(_: nn.Module, __: Gradients, gradients: Gradients) -> None:
        assert isinstance(gradients, tuple)
        rows = gradients[0][:, SINKS:].flatten(0, 1)
        if len(moment.lower) > 1:
            moment.add(rows)
        else:
            moment.lower += rows.norm().double().square()
            moment.count += rows.numel()

    return hook


def _gradient(model: LPAForCausalLM, states: Tensor, generator: torch.Generator) -> Tensor:
    """Of the sum of drawn labels' negative log-probabilities, by the states [T, d] before the head."""
    parts = []
    for start in range(0, len(states), ROWS):
        part = states[start : start + ROWS].requires_grad_(True)
        with torch.enable_grad():
            logits = model.logits(part)
        by_logits = logits.detach().softmax(-1)
        labels = drawn(by_logits, generator)
        by_logits.scatter_add_(1, labels, -torch.ones(labels.shape))  # probabilities, less one at the label
        parts.append(torch.autograd.grad(logits, part, by_logits)[0])
    return torch.cat(parts)


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A column of each row of [n, vocab], int64 [n, 1]; several times as fast as torch.multinomial, which draws a
    number for every column."""
    cumulative = probabilities.cumsum(-1)
    points = torch.rand(len(probabilities), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_max(probabilities.shape[1] - 1)
