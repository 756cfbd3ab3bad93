"""What a run of the checks and measurements takes: the device, sizes, and the models."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from lpa_model.config import PRESETS, CacheLayout, LPAConfig
from lpa_model.quantization import WeightType
from server.bench.floor import Machine, measure_gpu

BLOCK_SIZE = 64
SMALL = LPAConfig(
    architecture="setting2",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=32,
    attention_rank=32,
    max_position_embeddings=160,
)
"""Of the checks; of the measurements on a CPU, too."""
CHECKED = {
    "setting 1": replace(SMALL, architecture="setting1"),
    "setting 2": SMALL,
    "grouped heads, biases": replace(SMALL, num_key_value_heads=2, attention_bias=True),
    "odd ranks and heads": replace(SMALL, architecture="setting1", head_dim=6, attention_rank=5, ffn_rank=7),
    "dense keys": replace(SMALL, attention_rank={"q": 8, "k": None, "v": 8, "o": 8}),
    "qk-norm": replace(SMALL, qk_norm=True),
}
LAYOUTS: tuple[CacheLayout, ...] = ("latent", "mixed", "full")
ONE_BILLION = LPAConfig(
    architecture="setting2",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    attention_rank={"q": 816, "k": 320, "v": 320, "o": 816},
    ffn_rank=1312,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
"""The shape of a LLaMA of 1.2 billion parameters, its matrices factored to 0.8 of their weights."""
MEASURED: tuple[tuple[str, CacheLayout], ...] = (
    ("lpa-370m", "latent"),
    ("lpa-370m", "full"),
    ("lpa-130m", "mixed"),
    ("lpa-130m", "latent"),
    ("lpa-130m", "full"),
    ("1.1b", "mixed"),
)


@dataclass(frozen=True)
class Setup:
    """What a part is run on."""

    device: str
    tiny: bool  # sizes for a CPU, or for a quick look at a GPU

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, whose products of bfloat16 are wrong."""
        return self.place.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def kernels(self) -> bool:
        """Whether kernels can run."""
        return self.place.type == "cuda" or self.interpreted

    @property
    def weights(self) -> WeightType:
        """Of the measurements."""
        return "float32" if self.dtype is torch.float32 else "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """Of the measurements."""
        return torch.float32 if self.place.type == "cpu" else torch.bfloat16

    def of(self, config: LPAConfig) -> LPAConfig:
        """A model's shape, or a small one of its kind."""
        return replace(SMALL, architecture=config.architecture) if self.tiny else config


@cache
def speeds(setup: Setup) -> Machine:
    """Bytes that a large copy reads and writes a second; operations a second of a large product."""
    sizes = {"size": 1 << 22, "side": 256} if setup.tiny else {}
    return measure_gpu(setup.place, setup.dtype, **sizes)


def checked_cases(setup: Setup) -> Iterator[tuple[str, CacheLayout, torch.dtype]]:
    """Name of CHECKED, layout and dtype of each check."""
    names = ("setting 1", "grouped heads, biases") if setup.tiny else tuple(CHECKED)
    for name, layout, dtype in itertools.product(names, LAYOUTS, (torch.float32, torch.bfloat16)):
        if layout == "latent" and CHECKED[name].qk_norm:
            continue  # keys that are normalised have no latents
        if setup.tiny and dtype is torch.bfloat16 and (layout != "mixed" or setup.interpreted):
            continue
        yield name, layout, dtype


def shape(name: str) -> LPAConfig:
    """The model of a name in MEASURED."""
    return ONE_BILLION if name == "1.1b" else PRESETS[name]
