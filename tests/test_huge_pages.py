"""Weights one behind the other in memory of large pages."""

from __future__ import annotations

import gc
import itertools
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpa_model.backends.cpu.huge_pages import CACHE_LINE, CHUNK, HugePages
from lpa_model.backends.select import choose
from lpa_model.config import Architecture
from tests.tiny import random_model, tiny_config

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 320}  # no padding


def test_copies_hold_what_was_copied_and_do_not_overlap() -> None:
    memory, generator = HugePages(), torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(7, 5, generator=generator).T,
        torch.randint(-128, 128, (3, 1), generator=generator, dtype=torch.int8),
        torch.randn(2, 3, 4, generator=generator).bfloat16().permute(2, 0, 1),
        torch.zeros(0, 4),
        torch.ones(CHUNK // 4 + 1),  # more than a chunk
        torch.randn(33, generator=generator),
    ]
    copies = [memory.empty(x.shape, x.dtype).copy_(x) for x in tensors]
    for x, copy in zip(tensors, copies, strict=True):
        assert copy.dtype is x.dtype and copy.is_contiguous() and torch.equal(copy, x)
        assert not x.numel() or copy.data_ptr() % CACHE_LINE == 0
    ranges = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies if copy.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_memory_is_freed_with_the_last_tensor_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []

    class Watched(mmap.mmap):
        def __init__(self, *arguments: int, **named: int) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Watched)
    memory = HugePages()
    first, second = (memory.empty((size,), torch.float32).fill_(1) for size in (3, 5))
    [chunk] = made
    del memory, first
    gc.collect()
    assert chunk() is not None and second.sum() == 5
    del second
    gc.collect()
    assert chunk() is None


@pytest.mark.parametrize(
    ("architecture", "ffn_rank"),
    [
        ("setting1", None),
        ("setting2", None),
        ("setting2", 32),
        ("setting2", {"gate": 32, "up": None, "down": None}),
    ],
    ids=("relu", "swiglu", "low", "mixed"),
)
def test_every_matrix_is_held_once(monkeypatch: pytest.MonkeyPatch, architecture: Architecture, ffn_rank: Any) -> None:
    sizes: list[int] = []
    empty = HugePages.empty

    def counted(memory: HugePages, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        sizes.append(math.prod(shape))
        return empty(memory, shape, dtype)

    monkeypatch.setattr(HugePages, "empty", counted)
    config = tiny_config(architecture, **SIZES, attention_rank=32, ffn_rank=ffn_rank)
    model = random_model(config)
    numbers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    choice = choose(config, dtype="float32", layout="full")
    assert choice.candidate.name == "cpu"
    choice.build(model).make_cache("full", 2, 64)
    assert sum(sizes) == numbers
