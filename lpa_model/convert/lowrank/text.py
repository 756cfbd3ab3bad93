"""The texts of a conversion as token windows: what is calibrated on, and two held-out ones to measure perplexity on.

The calibration's own kind is what follows the calibrated part in the same text, the other one a text of another kind:
measured on its own kind alone, calibration looks better than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lpa_model.config import LPAConfig
from lpa_model.model import LPAForCausalLM
from lpa_model.perplexity import Tally
from lpa_model.train.text import read_text
from lpa_model.train.tokenizer import END_OF_TEXT

WINDOW = 1024
"""Tokens that the model reads together, or its context if that is shorter."""
EVALUATED = 4096
"""Tokens of a text that perplexity is measured on."""


@dataclass(frozen=True)
class Texts:
    """Token ids int64 [windows, T]: of the calibration, of what else a repair reads, and of two texts to measure on,
    by name."""

    calibration: Tensor
    more: Tensor
    measured: dict[str, Tensor]


def read_texts(
    config: LPAConfig, tokenizer: Tokenizer, paths: Sequence[Path], num_tokens: int, steps: int = 0
) -> Texts:
    """Calibration text of `num_tokens` tokens, or as many as there are, from files or else the one that comes along;
    for a repair of so many `steps` a window each, as far as the text goes.

    Raises:
        ValueError: the text is too short for a window to calibrate on and one to measure on.
        OSError: a file cannot be read.
    """
    length = min(WINDOW, config.max_position_embeddings)
    own = _windows(tokenizer, [read_text(path) for path in paths] or [packaged_text()], config, length)
    held_out = max(1, min(EVALUATED // length, len(own) // 10))
    if len(own) < 2:
        raise ValueError(f"calibrate: the text has no two windows of {length} tokens: give more text")
    calibrated = max(1, num_tokens // length)
    calibration, more = own[:-held_out][:calibrated], own[:-held_out][calibrated:steps]
    name, text = ("its README", readme()) if not paths else ("books", packaged_text())
    other = _windows(tokenizer, [text], config, length)[: max(1, EVALUATED // length)]
    return Texts(calibration, more, {"calibration's own kind": own[-held_out:], name: other})


def packaged_text() -> str:
    """Passages of public-domain books, without the header that names them."""
    return (files(__package__) / "calibration.txt").read_text(encoding="utf-8").split("\n\n", 1)[1]


def readme() -> str:
    """The package's own documents, as a text of another kind."""
    folder = files("lpa_model")
    return "\n\n".join((folder / name).read_text(encoding="utf-8") for name in ("README.md", "backends/cpu/README.md"))


def _windows(tokenizer: Tokenizer, texts: Sequence[str], config: LPAConfig, length: int) -> Tensor:
    """[windows, length]: all documents one after another, an EOS behind each if the model has one."""
    end = list(config.eos_token_ids[:1])
    ids: list[int] = []
    for text in texts:
        for document in text.split(f"\n{END_OF_TEXT}\n"):
            ids += [*tokenizer.encode(document, add_special_tokens=False).ids, *end]
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


@torch.inference_mode()
def measure(model: LPAForCausalLM, windows: Tensor) -> Tally:
    """Log-probabilities of every token of [windows, T] but the first of each window."""
    tally = Tally()
    for window in windows:
        hidden = model(window[None, :-1])[0]
        for start in range(0, len(hidden), 256):  # rows of logits held at a time
            logprobs = model.logits(hidden[start : start + 256]).log_softmax(-1)
            tally.add_logprobs(logprobs.gather(1, window[1 + start : 257 + start, None])[:, 0].tolist())
    return tally
