"""Hyperparameters of a training run, and what follows from them by arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, text: str) -> Any:
    """A field and what `lpa train --help` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters: all that determines the weights, besides the model's config and the data.

    A step sees `batch_tokens` tokens in sequences of `sequence_length`; the first `short_steps` steps use
    `short_sequence_length` instead, which is cheaper while the model has little use for a long context.
    """

    steps: int = _option(1000, "Steps of the run, those of an earlier start included.")
    batch_tokens: int = _option(8192, "Tokens of a step.")
    gradient_accumulation: int = _option(
        1, "Parts of a step, computed one after another in less memory; their gradients are added up."
    )
    sequence_length: int = _option(1024, "Tokens of a sequence, at most the model's context.")
    short_sequence_length: int = _option(256, "Tokens of a sequence in the first --short-steps.")
    short_steps: int = _option(0, "Steps at the beginning with shorter sequences, which are cheaper.")
    learning_rate: float = _option(2e-3, "Peak learning rate of AdamW.")
    muon_learning_rate: float | None = _option(
        None, "Train the matrices of the blocks with Muon at this peak learning rate (default: AdamW for all)."
    )
    final_fraction: float = _option(0.05, "Share of the peak learning rate that is left at the last step.")
    warmup_steps: int = _option(100, "Steps in which the learning rate rises to its peak.")
    weight_decay: float = _option(0.1, "Decoupled weight decay of the matrices of the blocks.")
    clip: float = _option(1.0, "Largest norm of the gradient; a longer one is scaled down.")
    seed: int = _option(0, "Initial weights and the order of the text follow from it.")

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_tokens": 1, "short_steps": 0, "warmup_steps": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")
        for name in ("learning_rate", "muon_learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} is not a positive number")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction: {self.final_fraction} is not between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay} is not a number from 0")
        for name in ("sequence_length", "short_sequence_length")[: 2 if self.short_steps else 1]:
            if not 1 <= getattr(self, name) <= self.batch_tokens:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is not between 1 and batch_tokens, {self.batch_tokens}"
                )
        sequences = self.batch_tokens // self.longest
        if not 1 <= self.gradient_accumulation <= sequences:
            raise ValueError(
                f"gradient_accumulation: {self.gradient_accumulation} is not between 1 and the {sequences} sequences "
                "of a step"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a step has."""
        return max(self.sequence_length, self.short_sequence_length if self.short_steps else 0)

    def length(self, step: int) -> int:
        """Tokens of a sequence at a step."""
        return self.short_sequence_length if step < self.short_steps else self.sequence_length

    def sequences(self, step: int) -> int:
        """Sequences of a step."""
        return self.batch_tokens // self.length(step)

    def tokens_before(self, step: int) -> int:
        """Tokens that all steps before this one see together."""
        short = min(step, self.short_steps)
        return sum(
            count * self.length(at) * self.sequences(at)
            for count, at in ((short, 0), (step - short, self.short_steps))
            if count
        )

    def rate(self, step: int) -> float:
        """The factor on the learning rates at a step: linear warm-up, then cosine decay to `final_fraction`."""
        return rate(step, self.steps, self.warmup_steps, self.final_fraction)


def rate(step: int, steps: int, warmup: int, final: float) -> float:
    """The factor on a learning rate: linear warm-up, then cosine decay to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
