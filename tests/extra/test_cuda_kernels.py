"""Triton's kernels in its interpreter, on this CPU: each against its definition in plain torch, and in whole steps.

What the interpreter does not check: shared memory, registers, launch sizes, compilation, and any speed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lpa_model.backends.cuda import decode, gemm, kernels, norms, prompt, rope, swiglu, twins
from lpa_model.backends.cuda.backend import CudaBackend
from lpa_model.backends.cuda.rows import Decodes, Prompts, Rows, step_rows
from lpa_model.backends.cuda.weights import Grouped, Heads, KeyUp, Matrix, Norm, PerHead, Rotary, Segment, padded
from lpa_model.batch import Batch, Span
from lpa_model.config import CacheLayout
from tests.test_backends import BLOCK_SIZE, Subject, Text, exact_twin, loaded, plain_logprobs, run

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
KERNELS = kernels.kernels(batch_invariant=True)
LENGTHS = (1, 0, 31, 140, 64)  # of decode rows: one token, padding, one tile, two splits


def _numbers(x: TensorHandle) -> NDArray[Any]:
    """The interpreter holds bfloat16 as bits, which its `tl.dot` multiplies as whole numbers."""
    bits: NDArray[Any] = x.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if bits.dtype == np.uint16 else bits


@pytest.fixture(autouse=True)
def dot_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> TensorHandle:
        # not matmul: a row's bits would depend on its place in the tile, by BLAS
        product = np.einsum("mk,kn->mn", _numbers(a), _numbers(b))
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def floats(x: Any) -> Any:
    """Tensors in any nesting of tuples, with what is rounded widened."""
    if isinstance(x, Tensor):
        return x.float() if x.is_floating_point() else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(floats, x))
    return x


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """float32: 1e-5 of numbers near 1; bfloat16: two roundings of 8 bits against none."""
    rounded = dtype is torch.bfloat16
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=2**-6 if rounded else 1e-5, atol=2**-7 if rounded else 1e-5
    )


class Numbers:
    """Random tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def columns(self, rows: int, columns: int) -> Tensor:
        """Columns of a wider tensor, NaN on both sides."""
        wide = torch.full((rows, columns + 32), float("nan"), dtype=self.dtype)
        wide[:, 16 : 16 + columns] = self(rows, columns)
        return wide[:, 16 : 16 + columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 64])
@torch.inference_mode()
def test_norms(d: int, dtype: torch.dtype) -> None:
    numbers = Numbers(d, dtype)
    norm, branch = Norm(numbers(d), numbers(d), 1e-5), numbers(3, d)
    for add, some in (("rms", branch), ("rms", None), ("layer", branch)):
        stream = torch.randn(3, d, generator=numbers.generator)
        expected_stream = stream.clone()
        kernel = norms.add_rms_norm if add == "rms" else norms.add_layer_norm
        twin = twins.add_rms_norm if add == "rms" else twins.add_layer_norm
        found = kernel(stream, some, norm)  # type: ignore[arg-type]  # only RMSNorm takes None
        expected = twin(expected_stream, floats(some), floats(norm))  # type: ignore[arg-type]  # likewise
        assert found.dtype is dtype
        near(stream, expected_stream, torch.float32)
        near(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 16, 300), (17, 40, 24)])
@torch.inference_mode()
def test_products_of_few_rows(rows: int, outs: int, ins: int, dtype: torch.dtype) -> None:
    numbers = Numbers(rows, dtype)
    x = numbers.columns(rows, ins)
    for bias in (None, numbers(outs)):
        matrix = Matrix(numbers(outs, ins, scale=ins**-0.5), bias)
        found = gemm.linear(x, matrix, invariant=True)
        near(found, twins.linear(x.float(), floats(matrix)), dtype)
        assert torch.equal(found[:1], gemm.linear(x[:1], matrix))  # a row's bits do not depend on the others


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products_of_some_columns_each(dtype: torch.dtype) -> None:
    numbers = Numbers(1, dtype)
    x = numbers(3, 80)
    weight = numbers(96, 48, scale=0.2)
    weight[32:48, 16:] = 0  # reads 16 columns, the last
    segments = (Segment(0, 32, 0), Segment(32, 48, 64), Segment(48, 96, 16))
    columns = torch.tensor([0, 0, 64, 16, 16, 16], dtype=torch.int32)
    grouped = Grouped(weight, numbers(96), segments, columns)
    near(gemm.grouped_linear(x, grouped), twins.grouped_linear(x.float(), floats(grouped)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products_of_each_head(dtype: torch.dtype) -> None:
    numbers = Numbers(2, dtype)
    x = numbers(3, 64 + 16)[:, :64].unflatten(1, (4, 16))
    for up in (
        PerHead(numbers(2, 48, 16, scale=0.25), numbers(2, 48)),
        PerHead(numbers(2, 16, 48, scale=0.25).mT, None),
    ):
        out = torch.full((3, 4, 48), float("nan"), dtype=dtype)
        expected = torch.empty(3, 4, 48)
        gemm.per_head(x, up, out)
        twins.per_head(x.float(), floats(up), expected)
        near(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_swiglu(dtype: torch.dtype) -> None:
    numbers = Numbers(3, dtype)
    gate, up = numbers.columns(2, 48), numbers.columns(2, 48)
    near(swiglu.swiglu(gate, up), twins.swiglu(gate.float(), up.float()), dtype)


def rotary(size: int) -> Rotary:
    angles = torch.outer(torch.arange(400.0), 0.3 ** torch.arange(size // 2))
    return Rotary(angles.cos(), angles.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "norms", "latent keys", "learned positions"])
@torch.inference_mode()
def test_rope_and_cache_write(form: str, dtype: torch.dtype) -> None:
    numbers = Numbers(4, dtype)
    size, width, keys_latent = 24, 32, form == "latent keys"
    turns = None if form == "learned positions" else rotary(size)
    norm = Norm(numbers(size), None, 1e-5) if form == "norms" else None
    heads = Heads(size, turns, norm, norm, keys_latent)
    q = numbers(4, 5 * width)
    q[:].unflatten(1, (5, width))[..., size:] = 0
    q = q.unflatten(1, (5, width))
    k, v = numbers(4, 3, width), numbers(4, 1, 48)
    k[..., size:] = 0
    if keys_latent:
        k = numbers(4, 1, 48)
    slots = torch.tensor([70, -1, 5, 6], dtype=torch.int32)
    rows = Rows(slots, torch.tensor([3, 0, 399, 7], dtype=torch.int32), slots, None, None)
    pools = [torch.full((3, x.shape[1], BLOCK_SIZE, x.shape[2]), float("nan"), dtype=dtype) for x in (k, v)]
    exact = [pool.float() for pool in pools]
    exact_q = q.float()
    twins.rotate_and_write(exact_q, k.float(), v.float(), rows, floats(heads), *exact)
    rope.rotate_and_write(q, k, v, rows, heads, *pools)
    near(q, exact_q, dtype)
    for pool, expected in zip(pools, exact, strict=True):
        assert torch.equal(pool.isnan(), expected.isnan())
        near(pool.nan_to_num(0.0), expected.nan_to_num(0.0), dtype)


def poisoned(numbers: Numbers, heads: int, width: int, tables: Tensor, lengths: Sequence[int]) -> Tensor:
    """A pool in which only the tokens of the sequences are numbers."""
    pool = torch.full((20, heads, BLOCK_SIZE, width), float("nan"), dtype=numbers.dtype)
    for table, length in zip(tables.tolist(), lengths, strict=True):
        for t in range(length):
            pool[table[t // BLOCK_SIZE], :, t % BLOCK_SIZE] = numbers(heads, width)
    return pool


FORMS = {
    "full": (False, False, 4, 2),
    "mixed": (False, True, 4, 2),
    "mixed, many heads": (False, True, 36, 36),
    "absorbed": (True, True, 4, 4),
    "absorbed, many heads": (True, True, 40, 40),
    "absorbed, dense values": (True, False, 4, 2),
    "rebuilt": (True, True, 4, 2),
    "rebuilt, dense values": (True, False, 4, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_decode_attention(form: str, dtype: torch.dtype) -> None:
    keys_latent, values_latent, heads, kv_heads = FORMS[form]
    numbers = Numbers(len(form), dtype)
    lengths = LENGTHS if heads == 4 else LENGTHS[-2:]
    size, rank = 24, 48
    tables = torch.randperm(20, generator=numbers.generator)[: len(lengths)].int()[:, None].repeat(1, 5)
    tables += torch.arange(5, dtype=torch.int32) * 7  # blocks may be shared: then what they hold is, too
    tables %= 20
    keys = poisoned(numbers, 1 if keys_latent else kv_heads, rank if keys_latent else padded(size), tables, lengths)
    values = poisoned(
        numbers, 1 if values_latent else kv_heads, rank if values_latent else padded(size), tables, lengths
    )
    rebuilt = None
    if form.startswith("rebuilt"):
        weight, bias = numbers(kv_heads, padded(size), rank, scale=rank**-0.5), numbers(kv_heads, padded(size))
        weight[:, size:], bias[:, size:] = 0, 0
        rebuilt = KeyUp(weight, bias if values_latent else None, rotary(size))
    q = numbers(len(lengths), heads, rank if keys_latent and rebuilt is None else padded(size))
    q[..., size if q.shape[2] == padded(size) else rank :] = 0
    decodes = Decodes(torch.tensor(lengths, dtype=torch.int32), tables)
    out = torch.full((len(lengths), heads, values.shape[3]), float("nan"), dtype=dtype)
    expected = torch.empty(out.shape)
    decode.decode_attention(q, keys, values, decodes, 0.2, rebuilt, out)
    exact = tuple(map(floats, (q, keys, values)))
    twins.decode_attention(*exact, decodes, 0.2, floats(rebuilt), expected)
    near(out, expected, dtype)
    # a row's bits depend on the row alone: neither on others nor on how wide the tables are
    last = len(lengths) - 1
    alone = torch.empty_like(out[:1])
    some = Decodes(decodes.lengths[last:], torch.nn.functional.pad(tables[last:], (0, 4)))
    decode.decode_attention(q[last:], keys, values, some, 0.2, rebuilt, alone)
    assert torch.equal(alone[0], out[last])


SPANS = [
    Span(0, 3, [4], False),
    Span(40, 5, [1, 3], False),
    Span(30, 40, [5, 2, 0], False, (40, 45, 58)),
    Span(33, 66, [6, 7, 8, 9], False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_prompt_attention(dtype: torch.dtype) -> None:
    numbers = Numbers(5, dtype)
    spans = SPANS
    rows = sum(span.length for span in spans)
    prompts = step_rows(Batch.build([0] * rows, spans, BLOCK_SIZE), CPU).prompts
    assert isinstance(prompts, Prompts)
    ends = [span.context + span.length for span in spans]
    keys = poisoned(numbers, 2, 32, prompts.tables, ends)
    values = poisoned(numbers, 2, 32, prompts.tables, ends)
    # values as they are expanded: blocks of the spans one after another, tokens before heads
    expanded = values[prompts.blocks.long()].transpose(1, 2).contiguous().transpose(1, 2)
    q = numbers(rows, 4, 32)
    out = torch.full(q.shape, float("nan"), dtype=dtype)
    expected = torch.empty(q.shape)
    tables = prompts.tables, prompts.places
    prompt.prompt_attention(q, keys, tables[0], expanded, tables[1], prompts, 0.2, out)
    exact = floats(q), floats(keys), tables[0], floats(expanded), tables[1]
    twins.prompt_attention(*exact, prompts, 0.2, expected)
    near(out, expected, dtype)
    # in chunks: the last span's second half alone
    chunk = SPANS[-1]._replace(context=73, length=26)
    last = step_rows(Batch.build([0] * 26, [chunk], BLOCK_SIZE), CPU).prompts
    assert last is not None
    part = torch.empty_like(q[-26:])
    prompt.prompt_attention(q[-26:], keys, last.tables, values, last.tables, last, 0.2, part)
    assert torch.equal(part, out[-26:])


CASES: list[tuple[str, CacheLayout]] = [
    ("setting1-gqa", "latent"),
    ("setting1-dense-v", "latent"),
    ("setting1-ffn", "full"),
    ("setting2-wide", "mixed"),
    ("setting2-bias", "latent"),
    ("setting2-qk-norm-gqa", "mixed"),
    ("setting2-mixed-ffn", "full"),
]


def small_texts(rng: random.Random) -> list[Text]:
    texts = [Text([rng.randrange(300) for _ in range(n)], p) for n, p in ((37, 34), (6, 4))]
    texts.append(Text([*texts[0].ids[:BLOCK_SIZE], 7, 8, 9], 34, BLOCK_SIZE))
    texts[1], texts[2] = texts[2], texts[1]  # the one that shares comes behind the one it shares with
    return texts


def computed(case: str, layout: CacheLayout, seed: int) -> list[Text]:
    """Texts that went through the backend in random chunks and batches."""
    model = loaded(case, Subject(torch.float32, "cuda", "float32", torch.float32))
    texts = small_texts(random.Random(1))
    run(CudaBackend(model, "kernels", KERNELS, True), layout, texts, seed=seed)
    return texts


@pytest.mark.parametrize(("case", "layout"), CASES)
@torch.inference_mode()
def test_whole_steps_equal_the_plain_forward(case: str, layout: CacheLayout) -> None:
    model = exact_twin(loaded(case, Subject(torch.float32, "cuda", "float32", torch.float32)))
    for text in computed(case, layout, seed=1):
        found, expected = torch.cat(text.rows), plain_logprobs(model, text.ids)[text.shared :]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_bits_do_not_depend_on_chunks_and_batches() -> None:
    first, second = (computed("setting2", "mixed", seed) for seed in (1, 2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(torch.cat(one.rows), torch.cat(other.rows))
