"""Norms and SwiGLU of every instruction set and dtype against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.oplist import OpList
from tests.cpu_kernels import DTYPES, ROW_NAMES, error_of, float64, guarded, kernels_here, rows_of

EPS = 1e-5
each = pytest.mark.parametrize("name", ROW_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
shapes = given(
    rows=st.integers(1, 20),
    width=st.integers(1, 200),
    padding=st.integers(0, 40),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(name: str, dtype: torch.dtype, rows: int, add: Callable[[OpList], None]) -> None:
    ops = OpList(kernels_here()[name], dtype)
    add(ops)
    ops.run(rows)


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> np.ndarray:
    x64 = float64(x)
    return x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * float64(weight)


def assert_close(out: Tensor, expected: np.ndarray, roundings: int, size: float | np.ndarray = 0) -> None:
    bound = (1e-5 + 1.02 * roundings * error_of(out.dtype)) * np.abs(expected) + 1e-6 * size + 1e-30
    assert (np.abs(float64(out) - expected) <= bound).all()


@each
@each_dtype
@shapes
def test_rms_norm(name: str, dtype: torch.dtype, rows: int, width: int, padding: int, spare: int, seed: int) -> None:
    x, weight = numbers(seed, rows, width, dtype=torch.float32), numbers(seed + 1, width, dtype=dtype)
    out = rows_of(torch.full((rows, width + padding), torch.nan, dtype=dtype), spare)
    run(name, dtype, rows, lambda ops: ops.rms_norm(rows_of(x, spare), guarded(weight), out, EPS))
    assert_close(out[:, :width], rms_normed(x, weight, EPS), 2)
    assert (out[:, width:] == 0).all()


@each
@each_dtype
@given(
    rows=st.integers(1, 9),
    heads=st.integers(1, 5),
    size=st.integers(1, 70),
    padding=st.integers(0, 20),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_head_rms_norm_in_place(
    name: str, dtype: torch.dtype, rows: int, heads: int, size: int, padding: int, spare: int, seed: int
) -> None:
    x, weight = numbers(seed, rows, heads, size, dtype=dtype), numbers(seed + 1, size, dtype=dtype)
    padded = torch.nn.functional.pad(x, (0, padding)).flatten(1)
    memory = rows_of(padded, spare)
    run(name, dtype, rows, lambda ops: ops.head_rms_norm(memory, guarded(weight), memory, EPS, heads))
    out = memory.unflatten(1, (heads, -1))
    assert_close(out[:, :, :size], rms_normed(x, weight, EPS), 2)
    assert (out[:, :, size:] == 0).all()


@each
@each_dtype
@shapes
def test_add_layer_norm(
    name: str, dtype: torch.dtype, rows: int, width: int, padding: int, spare: int, seed: int
) -> None:
    x, residual = numbers(seed, rows, width, dtype=dtype), numbers(seed + 1, rows, width, dtype=torch.float32)
    weight, bias = numbers(seed + 2, width, dtype=dtype), numbers(seed + 3, width, dtype=dtype)
    expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS).numpy()
    expected += float64(residual)
    for out in (None, rows_of(torch.full((rows, width + padding), torch.nan, dtype=dtype), spare)):
        stream = rows_of(residual, spare)
        run(
            name,
            dtype,
            rows,
            lambda ops, stream=stream, out=out: ops.add_layer_norm(
                rows_of(x, spare), stream, guarded(weight), guarded(bias), out, EPS
            ),
        )
        # a row of equal numbers is divided by the eps alone
        assert_close(stream, expected, 1, 400 * (1 + np.abs(float64(x)).max()))
        if out is not None:
            assert torch.equal(out[:, :width], stream.to(dtype))
            assert (out[:, width:] == 0).all()


@each
@each_dtype
@shapes
def test_swiglu(name: str, dtype: torch.dtype, rows: int, width: int, padding: int, spare: int, seed: int) -> None:
    gate, up = 9 * numbers(seed, rows, width, dtype=dtype), numbers(seed + 1, rows, width, dtype=dtype)
    out = rows_of(torch.full((rows, width + padding), torch.nan, dtype=dtype), spare)
    run(name, dtype, rows, lambda ops: ops.swiglu(rows_of(gate, spare), rows_of(up, 0), out))
    gate64 = float64(gate)
    assert_close(out[:, :width], gate64 / (1 + np.exp(-gate64)) * float64(up), 1)
    assert (out[:, width:] == 0).all()
