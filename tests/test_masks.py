"""Logits copied without what masks forbid: by the kernel and by torch, against the mask read bit by bit."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpa_model.backends.cpu.kernels.launch import compile_kernel
from lpa_model.backends.cpu.kernels.masks import KERNELS, copy_allowed
from lpa_model.backends.torch import rows as torch_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.sampled_from([0.1, 0.9]), st.randoms(use_true_random=False))
def test_what_a_mask_forbids_is_minus_infinity(
    dtype: torch.dtype, vocab: int, share: float, rng: random.Random
) -> None:
    """Whatever was there, and with more bytes than the vocabulary takes."""
    numbers = [1.5, -2.0, 0.0, math.nan, math.inf, -math.inf]
    logits = torch.tensor([[rng.choice(numbers) for _ in range(vocab)] for _ in range(6)]).to(dtype)
    allowed = [None if rng.random() < 0.3 else [rng.random() < share for _ in range(vocab + 9)] for _ in range(6)]
    masks = [None if bits is None else np.packbits(bits, bitorder="little") for bits in allowed]
    expected = torch.tensor(
        [
            [x if bits is None or bits[token] else -math.inf for token, x in enumerate(row)]
            for bits, row in zip(allowed, logits.tolist(), strict=True)
        ]
    )
    kernel = compile_kernel(KERNELS[dtype]).result()
    assert kernel is not None
    for found in (copy_allowed(kernel, logits, masks), torch_rows.copy_allowed(logits, masks)):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
