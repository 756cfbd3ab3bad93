"""Prompt attention in tiles of bfloat16 against float64, and to the bit against itself in other pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.numba import records
from lpa_model.backends.cpu.numba.attention import call_of_layer
from lpa_model.backends.cpu.numba.launch import compile_kernel
from lpa_model.backends.cpu.numba.programs import KERNELS, Program
from lpa_model.backends.cpu.numba.prompts import NO_PROMPTS, PromptRows
from lpa_model.backends.features import instruction_sets
from lpa_model.batch import Batch, Span
from tests.conftest import to_vnni

PROGRAM_SETS = [name for name in instruction_sets() if name in KERNELS]
pytestmark = pytest.mark.skipif(
    not PROGRAM_SETS, reason="the kernel needs a processor that multiplies pairs of bfloat16"
)

BLOCK_SIZE = 64
INSTRUCTIONS = st.sampled_from(PROGRAM_SETS or ["none"])


@dataclass
class Texts:
    """Random queries, keys and values of texts of one length."""

    q: Tensor  # [batch, T, H, dh]
    keys: Tensor  # [batch, T, H_kv, dh]
    values: Tensor
    branches: tuple[int, ...]
    instructions: str

    def attend(self, context: int = 0, texts: slice = slice(None), end: int | None = None) -> Tensor:
        """[batch, T - context, H, dh], computed in one go, without what is behind `end`."""
        kernel = compile_kernel(KERNELS[self.instructions]).result()
        assert kernel is not None
        q, keys, values = self.q[texts, context:end], self.keys[texts, :end], self.values[texts, :end]
        batch, length, heads, width = q.shape
        blocks = -(-(context + length) // BLOCK_SIZE)
        order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).view(batch, blocks)
        pools = []
        for x in (keys, values):  # what is in the cache already, among numbers that nobody has written
            pool = torch.full((batch * blocks, x.shape[2], BLOCK_SIZE, width), torch.nan, dtype=torch.bfloat16)
            for table, text in zip(order, x, strict=True):
                for t in range(context):
                    pool[table[t // BLOCK_SIZE], :, t % BLOCK_SIZE] = text[t]
            pools.append(pool)
        pools[1] = to_vnni(pools[1])
        new_keys, new_values = (x[:, context:].flatten(2).flatten(0, 1) for x in (keys, values))
        queries, out = q.flatten(0, 1).contiguous(), torch.empty(batch * length, heads, width, dtype=torch.bfloat16)
        program = Program(np.zeros(1, dtype=records.CALL))
        program.attention()
        program.widest = heads * width
        call = call_of_layer(queries, new_keys, new_values, *pools, out, width**-0.5, turns=None)
        spans = [Span(context, length, table, False, self.branches) for table in order.tolist()]
        rows = PromptRows.of(Batch.build([0] * sum(span.length for span in spans), spans, BLOCK_SIZE))
        tiled_values = torch.full((keys.shape[2] * width, rows.value_tiles * 32), torch.nan, dtype=torch.bfloat16)
        for name, value in (NO_PROMPTS | call | rows.fields | {"tiled_values": tiled_values.data_ptr()}).items():
            program.calls[name] = value
        program.run(kernel, batch * length)
        return out.view(batch, length, heads, width)

    def expected(self) -> tuple[Tensor, Tensor]:
        """In float64, and the same with absolute values, to which rounding errors are in proportion."""
        group = self.q.shape[2] // self.keys.shape[2]
        q = self.q.double().transpose(1, 2)
        keys, values = (x.double().transpose(1, 2).repeat_interleave(group, 1) for x in (self.keys, self.values))
        scores = q @ keys.transpose(2, 3) * q.shape[3] ** -0.5
        visible = torch.from_numpy(Span(0, q.shape[2], (), False, self.branches).mask())
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ values).transpose(1, 2), (weights @ values.abs()).transpose(1, 2)


@st.composite
def texts(draw: st.DrawFn) -> Texts:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width = draw(st.sampled_from([32, 64, 96]))
    branches = tuple(sorted(draw(st.sets(st.integers(1, length - 1), max_size=3)))) if length > 1 else ()
    spread = draw(st.sampled_from([1.0, 10.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def numbers(heads: int) -> Tensor:
        return torch.randn(batch, length, heads, width, generator=generator).mul(spread).bfloat16()

    return Texts(numbers(key_heads * group), numbers(key_heads), numbers(key_heads), branches, draw(INSTRUCTIONS))


@settings(deadline=None, max_examples=80)
@given(texts())
def test_attention_is_right(case: Texts) -> None:
    expected, size = case.expected()
    assert ((case.attend() - expected).abs() <= 0.01 * size + 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(texts(), st.data())
def test_a_query_depends_on_what_it_sees_alone(case: Texts, data: st.DataObject) -> None:
    whole = case.attend()
    length = whole.shape[1]
    context = data.draw(st.integers(0, length - 1))
    assert torch.equal(case.attend(context), whole[:, context:])
    assert torch.equal(case.attend(texts=slice(0, 1)), whole[:1])
    end = data.draw(st.integers(context + 1, length))
    assert torch.equal(case.attend(context, end=end), whole[:, context:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(case.attend(), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("instructions", PROGRAM_SETS)
def test_what_is_not_a_number_stays_where_it_is_seen(instructions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(2, 70, 2, 32, generator=generator).bfloat16() for _ in range(3))
    clean = Texts(q, keys, values, (), instructions).attend()
    for spoiled in (0, 1):
        parts = [q.clone(), keys.clone(), values.clone()]
        parts[1 + spoiled][0, 64:] = np.nan  # a later tile of the first text
        found = Texts(*parts, (), instructions).attend()
        assert torch.equal(found[0, :64], clean[0, :64])
        assert found[0, 69].isnan().all()
        assert torch.equal(found[1], clean[1])
