"""Weights one behind the other in memory of large pages."""

from __future__ import annotations

import gc
import itertools
import mmap
import weakref

import pytest
import torch

from lpa_model.backends.cpu.huge_pages import CACHE_LINE, CHUNK, HugePages


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
    copies = [memory.copy(x) for x in tensors]
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
    first, second = memory.copy(torch.ones(3)), memory.copy(torch.ones(5))
    [chunk] = made
    del memory, first
    gc.collect()
    assert chunk() is not None and second.sum() == 5
    del second
    gc.collect()
    assert chunk() is None
