"""The GEMM of every instruction set and dtype against float64, and its bits against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.args import Epilogue
from lpa_model.backends.cpu.oplist import OpList, gemm
from lpa_model.backends.cpu.packing import PackedWeight, pack, pack_gated, padded
from lpa_model.quantization import Bits, Quantized, WeightType, quantize, quantized_input
from tests.cpu_kernels import DTYPES, GEMM_NAMES, error_of, float64, guarded, kernels_here, rows_of

each = pytest.mark.parametrize("name", GEMM_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
QUANTIZED: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
seldom = settings(max_examples=settings.default.max_examples // 3)  # each takes long
each_quantized = pytest.mark.parametrize("weights", QUANTIZED)


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def behind_guards(weight: PackedWeight) -> PackedWeight:
    bias = None if weight.bias is None else guarded(weight.bias)
    return replace(weight, panels=guarded(weight.panels), bias=bias)


def held(weight: Tensor, weights: WeightType) -> Tensor | Quantized:
    if weights in QUANTIZED:
        return quantize(weight, QUANTIZED[weights])
    return weight.to(torch.float32 if weights == "float32" else torch.bfloat16)


def widened(x: Tensor, groups: int = 1) -> Tensor:
    """x with each group's part padded with zeros to what a packed weight reads."""
    parts = x.unflatten(1, (groups, -1))
    return torch.nn.functional.pad(parts, (0, padded(parts.shape[2]) - parts.shape[2])).flatten(1)


def assert_close(out: Tensor, expected: np.ndarray, size: np.ndarray) -> None:
    """`size`: of the terms that were summed up, in which float32 rounds; the dtype rounds once more."""
    bound = 2e-6 * size + 1.01 * error_of(out.dtype) * np.abs(expected) + 1e-30
    assert (np.abs(float64(out) - expected) <= bound).all()


@each
@each_dtype
@given(
    rows=st.one_of(st.integers(1, 40), st.integers(1, 600)),
    width=st.one_of(st.integers(1, 100), st.integers(200, 700)),
    outputs=st.integers(1, 130),
    biased=st.booleans(),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_gemm_is_the_sum_of_products(
    name: str, dtype: torch.dtype, rows: int, width: int, outputs: int, biased: bool, spare: int, seed: int
) -> None:
    rows = min(rows, 6_000_000 // (width * outputs))  # the portable kernels and the emulated ones are slow
    x, weight = numbers(seed, rows, width, dtype=dtype), numbers(seed + 1, outputs, width, dtype=dtype)
    bias = numbers(seed + 2, outputs, dtype=dtype) if biased else None
    out = rows_of(torch.full((rows, outputs), torch.nan, dtype=dtype), spare)
    ops = OpList(kernels_here()[name], dtype)
    ops.gemm(rows_of(widened(x), spare), behind_guards(pack(weight, bias)), out)
    ops.run(rows)
    added = 0 if bias is None else float64(bias)
    expected = float64(x) @ float64(weight).T + added
    assert_close(out, expected, np.abs(float64(x)) @ np.abs(float64(weight)).T + np.abs(added))


@each
@seldom
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    outputs=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_bfloat16_weights_meet_float32_rows(name: str, rows: int, width: int, outputs: int, seed: int) -> None:
    x, weight = numbers(seed, rows, width, dtype=torch.float32), numbers(seed + 1, outputs, width, dtype=torch.bfloat16)
    bias = numbers(seed + 2, outputs, dtype=torch.float32)
    out = gemm(kernels_here()[name], rows_of(widened(x), 1), behind_guards(pack(weight, bias)), outputs)
    size = np.abs(float64(x)) @ np.abs(float64(weight)).T + np.abs(float64(bias))
    assert_close(out, float64(x) @ float64(weight).T + float64(bias), size)


@each
@each_dtype
@each_quantized
@seldom
@given(
    rows=st.one_of(st.integers(1, 40), st.integers(100, 300)),
    groups=st.sampled_from((1, 1, 3)),
    width=st.integers(1, 300),
    outputs=st.integers(1, 130),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_quantized_gemm_is_that_of_the_codes(
    name: str,
    dtype: torch.dtype,
    weights: WeightType,
    rows: int,
    groups: int,
    width: int,
    outputs: int,
    biased: bool,
    seed: int,
) -> None:
    rows = max(1, min(rows, 3_000_000 // (width * outputs * groups)))
    x, weight = (
        numbers(seed, rows, groups * width, dtype=dtype),
        numbers(seed + 1, groups * outputs, width, dtype=dtype),
    )
    x *= numbers(seed + 3, rows, 1, dtype=dtype).exp()
    bias = numbers(seed + 2, groups * outputs, dtype=dtype) if biased else None
    packed = behind_guards(pack(held(weight, weights), bias, groups))
    out = gemm(kernels_here()[name], rows_of(widened(x, groups), 2), packed).unflatten(1, (groups, -1))
    parts = float64(quantized_input(x.float().unflatten(1, (groups, width))))
    plain = float64(quantize(weight, QUANTIZED[weights]).dequantized()[:, :width]).reshape(groups, outputs, width)
    added = np.zeros((groups, outputs)) if bias is None else float64(bias).reshape(groups, outputs)
    expected = np.einsum("rgi,goi->rgo", parts, plain) + added
    size = np.einsum("rgi,goi->rgo", np.abs(parts), np.abs(plain)) + np.abs(added)
    assert_close(out[:, :, :outputs], expected, size)
    assert (out[:, :, outputs:] == 0).all()


@each
@each_quantized
@seldom
@given(rows=st.integers(1, 20), groups=st.integers(1, 9), extreme=st.booleans(), seed=st.integers(0, 1000))
def test_dot_products_are_exact(
    name: str, weights: WeightType, rows: int, groups: int, extreme: bool, seed: int
) -> None:
    """With scales of 1 the outputs are the whole numbers themselves; products of the largest codes do not saturate."""
    rng, most = np.random.default_rng(seed), 127 if weights == "int8" else 7
    least = -127 if weights == "int8" else -8
    x = rng.choice([-127, 127], (rows, groups, 32)) if extreme else rng.integers(-127, 128, (rows, groups, 32))
    codes = rng.choice([least, most], (64, groups, 32)) if extreme else rng.integers(least, most + 1, (64, groups, 32))
    x[:, :, 5], codes[:, :, 7] = 127, least  # so that the scales are 1
    weight = torch.from_numpy(codes.reshape(64, -1)).float()
    assert (quantize(weight, QUANTIZED[weights]).scales == 1).all()
    packed = pack(held(weight, weights))
    out = gemm(kernels_here()[name], torch.from_numpy(x.reshape(rows, -1)).float(), packed)
    assert np.array_equal(out.numpy(), np.einsum("rgi,ogi->ro", x, codes).astype(np.float32))


@each
@each_quantized
def test_a_group_that_is_not_finite_gives_nan(name: str, weights: WeightType) -> None:
    x = torch.ones(4, 64)
    x[1, 3], x[2, 40], x[3, 63] = torch.nan, torch.inf, -torch.inf
    out = gemm(kernels_here()[name], x, pack(held(torch.ones(32, 64), weights)))
    assert out[0].isfinite().all() and out[1:].isnan().all()
    tiny = gemm(kernels_here()[name], torch.full((1, 64), 1e-40), pack(held(torch.ones(32, 64), weights)))
    assert (tiny == 0).all()


@each
@each_dtype
def test_epilogues(name: str, dtype: torch.dtype) -> None:
    rows, width, outputs = 37, 72, 56
    x, bias = numbers(0, rows, width, dtype=dtype), numbers(1, outputs, dtype=dtype)
    weight, other = numbers(2, outputs, width, dtype=dtype), numbers(3, outputs, width, dtype=dtype)
    stream = numbers(4, rows, outputs, dtype=torch.float32)
    kernels, packed, through = kernels_here()[name], pack(weight, bias), float64(x) @ float64(weight).T
    size = np.abs(float64(x)) @ np.abs(float64(weight)).T + 1

    def run(weight: PackedWeight, epilogue: Epilogue, out: Tensor) -> Tensor:
        ops = OpList(kernels, dtype)
        ops.gemm(widened(x), weight, out, epilogue)
        ops.run(rows)
        return out

    summed = through + float64(bias)
    assert_close(run(packed, Epilogue.RELU, torch.empty(rows, outputs, dtype=dtype)), np.maximum(summed, 0), size)
    gated = run(pack_gated(weight, other), Epilogue.SWIGLU_GATED, torch.empty(rows, outputs, dtype=dtype))
    up = float64(x) @ float64(other).T
    assert_close(gated, through / (1 + np.exp(-through)) * up, 2 * size * (1 + np.abs(up)))
    plain = gemm(kernels, widened(x), packed, outputs)
    added = run(packed, Epilogue.RESIDUAL_ADD, rows_of(stream, 3))
    assert torch.equal(added, stream + plain.float())  # rounded to the dtype before it is added


@each
@each_dtype
def test_relu_and_silu_keep_nan_and_infinities(name: str, dtype: torch.dtype) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -3e4, 3e4, 0.0])
    x = torch.zeros(len(values), 32, dtype=dtype)
    x[:, 0] = values.to(dtype)
    one = torch.zeros(1, 32, dtype=dtype)
    one[0, 0] = 1
    for epilogue, weight, expected in (
        (Epilogue.RELU, pack(one), torch.relu(values)),
        (Epilogue.STORE, pack(one), values),
        (Epilogue.SWIGLU_GATED, pack_gated(one, one), torch.nn.functional.silu(values) * values),
    ):
        out = torch.empty(len(values), 1, dtype=dtype)
        ops = OpList(kernels_here()[name], dtype)
        ops.gemm(x, weight, out, epilogue)
        ops.run(len(values))
        same = torch.isclose(out[:, 0].float(), expected, rtol=0.01, equal_nan=True)
        if epilogue is Epilogue.SWIGLU_GATED:
            same[2] = True  # -inf times 0 by the formula
        assert same.all(), (epilogue, out)


@each
@each_dtype
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    width=st.integers(1, 70),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_groups_read_their_own_part_of_a_row(
    name: str, dtype: torch.dtype, rows: int, groups: int, width: int, outputs: int, seed: int
) -> None:
    x = numbers(seed, rows, groups * width, dtype=dtype)
    weight, bias = numbers(1, groups * outputs, width, dtype=dtype), numbers(2, groups * outputs, dtype=dtype)
    packed = behind_guards(pack(weight, bias, groups))
    out = gemm(kernels_here()[name], rows_of(widened(x, groups), 0), packed).unflatten(1, (groups, -1))
    parts, weights = float64(x).reshape(rows, groups, width), float64(weight).reshape(groups, outputs, width)
    expected = np.einsum("rgi,goi->rgo", parts, weights) + float64(bias).reshape(groups, outputs)
    size = np.einsum("rgi,goi->rgo", np.abs(parts), np.abs(weights)) + np.abs(float64(bias)).reshape(groups, outputs)
    assert_close(out[:, :, :outputs], expected, size)
    assert (out[:, :, outputs:] == 0).all()  # so that what reads them may be padded, too


@each
@each_dtype
@pytest.mark.parametrize("weights", get_args(WeightType))
def test_a_rows_bits_depend_on_the_row_alone(name: str, dtype: torch.dtype, weights: WeightType) -> None:
    """Not on how many rows there are, where it is, how the work falls into items, nor how many threads there are."""
    if dtype is torch.bfloat16 and weights == "float32":
        return  # of no use, and refused
    width, outputs = 544, 96
    x = numbers(0, 600, width, dtype=dtype)
    weight = pack(held(numbers(1, outputs, width, dtype=dtype), weights))
    kernels = kernels_here()[name]
    all_rows = gemm(kernels, x, weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 17, 31, 32, 33, 64, 191, 192, 193, 256, 257):
            torch.set_num_threads(1 + count % 3)
            start = (7 * count) % (600 - count)
            assert torch.equal(gemm(kernels, x[start : start + count], weight), all_rows[start : start + count]), count
    finally:
        torch.set_num_threads(threads)


@each
@pytest.mark.parametrize("weights", get_args(WeightType))
def test_padded_outputs_and_inputs_change_no_bits(name: str, weights: WeightType) -> None:
    for dtype in DTYPES:
        if dtype is torch.bfloat16 and weights == "float32":
            continue
        x, weight = numbers(0, 5, 64, dtype=dtype), numbers(1, 64, 64, dtype=dtype)
        whole = gemm(kernels_here()[name], x, pack(held(weight, weights)))
        assert torch.equal(gemm(kernels_here()[name], x, pack(held(weight[:41], weights)), 41), whole[:, :41])
        x, longer = torch.nn.functional.pad(x, (0, 64)), torch.nn.functional.pad(weight, (0, 64))
        assert torch.equal(gemm(kernels_here()[name], x, pack(held(longer, weights))), whole)


def test_what_does_not_fit_is_refused() -> None:
    kernels = next(iter(kernels_here().values()))
    weight = pack(torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        OpList(kernels, torch.float16)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        pack(torch.zeros(32, 32, dtype=torch.float16))
    ops = OpList(kernels, torch.float32)
    good = torch.zeros(2, 32)
    for x, out in ((torch.zeros(2, 64), good), (good.bfloat16(), good), (torch.zeros(32, 2).t(), good)):
        with pytest.raises(ValueError, match="x is"):
            ops.gemm(x, weight, out)
    for out in (good.bfloat16(), torch.zeros(32, 2).t()):
        with pytest.raises(ValueError, match="out is"):
            ops.gemm(good, weight, out)
    with pytest.raises(ValueError, match="outputs"):
        ops.gemm(good, weight, torch.zeros(2, 64))
    with pytest.raises(ValueError, match="outputs"):
        ops.gemm(good, weight, good, Epilogue.SWIGLU_GATED)
    narrow = OpList(kernels, torch.bfloat16)
    with pytest.raises(ValueError, match=r"the weight is float32, the op list torch\.bfloat16"):
        narrow.gemm(good.bfloat16(), weight, good.bfloat16())
    biased = pack(torch.zeros(32, 32), torch.zeros(32))
    with pytest.raises(ValueError, match=r"its bias torch\.bfloat16, the op list torch\.float32"):
        ops.gemm(good, replace(biased, bias=torch.zeros(32, dtype=torch.bfloat16)), good)
