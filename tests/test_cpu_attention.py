"""Attention in C over a paged cache against float64, and to the bit against itself in other batches and chunks.

All unwritten numbers of the cache are NaN, or the scales of an int8 cache, so that one that is read and must not be
shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu.attention import DecodeRows, PromptRows, attend, from_vnni, layer_fields, to_vnni
from lpa_model.cache import dequantize_rows, quantize_rows
from tests.cpu_kernels import ATTENTION_NAMES, DTYPES, guarded, kernels_here

SHAPES = [(4, 4, 4), (8, 2, 2), (8, 1, 1), (12, 12, 1), (16, 1, 1), (20, 1, 1), (6, 1, 3), (12, 2, 4), (7, 1, 7)]


@dataclass
class Text:
    """One sequence: what comes after `context` tokens is new in this step."""

    context: int
    length: int
    decode: bool
    branches: tuple[int, ...]  # where continuations begin that see only themselves and what is before the first
    q: Tensor  # [context + length, H, key width]
    keys: Tensor  # [context + length, key heads, key width], not rotated
    values: Tensor  # [context + length, value heads, value width]
    table: list[int] = field(default_factory=list)

    def branch(self, token: int) -> int:
        return sum(start <= token for start in self.branches)

    def visible(self) -> Tensor:
        """Which token sees which, [context + length, context + length]."""
        branches = torch.tensor([self.branch(token) for token in range(len(self.q))])
        return ((branches == 0) | (branches == branches[:, None])).tril()

    def position(self, token: int) -> int:
        branch = self.branch(token)
        return token - self.branches[branch - 1] + self.branches[0] if branch else token

    def places(self, first: int, end: int, block_size: int) -> tuple[Tensor, slice, Tensor]:
        """Of tokens in a pool [blocks, heads, block_size, ..]."""
        blocks = torch.tensor([self.table[t // block_size] for t in range(first, end)], dtype=torch.long)
        return blocks, slice(None), torch.arange(first, end) % block_size

    def part(self, context: int, length: int, decode: bool) -> Text:
        end = context + length
        rows = (x[:end] for x in (self.q, self.keys, self.values))
        return Text(context, length, decode, self.branches, *rows, self.table)


@dataclass
class Cache:
    """Pools, the values' in the layout of their dtype; of int8, with the scales of both."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None
    block_size: int
    scale: float
    rope: Tensor | None
    name: str  # of the kernels

    @classmethod
    def build(
        cls,
        name: str,
        texts: list[Text],
        block_size: int,
        rope: Tensor | None,
        rng: random.Random,
        prefix: int = 0,
        is_int8: bool = False,
    ) -> Cache:
        """With what the texts' contexts need; the first `prefix` blocks of all texts are the same."""
        needed = [-(-(text.context + text.length) // block_size) - prefix for text in texts]
        free = list(range(prefix + sum(needed) + 3))
        total = len(free)
        rng.shuffle(free)
        common = [free.pop() for _ in range(prefix)]
        dtype = texts[0].q.dtype
        pools = [
            torch.full((total, x.shape[1], block_size, x.shape[2]), torch.nan, dtype=dtype)
            for x in (texts[0].keys, texts[0].values)
        ]
        for text, count in zip(texts, needed, strict=True):
            text.table = common + [free.pop() for _ in range(count)]
            places = text.places(0, text.context, block_size)
            pools[0][places] = rotated(text.keys[: text.context], rope, text, 0)
            pools[1][places] = text.values[: text.context]
        scale = texts[0].q.shape[2] ** -0.5
        if is_int8:
            (keys, key_scales), (values, value_scales) = map(quantize_rows, pools)
            return cls(keys, values, (key_scales, value_scales), block_size, scale, rope, name).copy()
        values = to_vnni(pools[1]) if dtype is torch.bfloat16 else pools[1]
        return cls(pools[0], values, None, block_size, scale, rope, name).copy()

    def copy(self) -> Cache:
        scales = None if self.scales is None else (guarded(self.scales[0]), guarded(self.scales[1]))
        return replace(self, keys=guarded(self.keys), values=guarded(self.values), scales=scales)

    def pools(self) -> list[Tensor]:
        """Keys, values and scales [blocks, heads, block_size, ..]."""
        values = from_vnni(self.values) if self.values.dtype is torch.bfloat16 else self.values
        return [self.keys, values, *(self.scales or ())]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, heads, block_size, width] as numbers."""
        keys, values, *scales = self.pools()
        if not scales:
            return keys, values
        return dequantize_rows(keys, scales[0], torch.float32), dequantize_rows(values, scales[1], torch.float32)

    def run(self, texts: list[Text]) -> list[Tensor]:
        """The texts' new tokens, [length, H, value width] each; those of `decode` have to come first."""
        q = guarded(torch.cat([text.q[text.context :] for text in texts]))
        keys, values = (
            torch.cat([x[text.context :] for text, x in zip(texts, rows, strict=True)]).flatten(1)
            for rows in ([text.keys for text in texts], [text.values for text in texts])
        )
        # as one GEMM leaves them
        wide = guarded(torch.cat((keys, torch.zeros(len(q), 3, dtype=q.dtype), values), 1))
        out = guarded(torch.full((*q.shape[:2], self.values.shape[3]), torch.nan, dtype=q.dtype))
        width = keys.shape[1]
        key_scales, value_scales = self.scales or (None, None)
        layer = layer_fields(
            q,
            wide[:, :width],
            wide[:, width + 3 :],
            self.keys,
            self.values,
            out,
            self.scale,
            rope=self.rope,
            key_scales=key_scales,
            value_scales=value_scales,
        )
        decodes, prompts = [text for text in texts if text.decode], [text for text in texts if not text.decode]
        attend(kernels_here()[self.name], q.dtype, layer, self.decode_rows(decodes), self.prompt_rows(prompts))
        return list(out.split([text.length for text in texts]))

    def decode_rows(self, texts: list[Text]) -> DecodeRows | None:
        if not texts:
            return None
        lengths = np.array([text.context + 1 for text in texts])
        return DecodeRows.build(lengths - 1, lengths, [text.table for text in texts], self.block_size)

    def prompt_rows(self, texts: list[Text]) -> PromptRows | None:
        if not texts:
            return None
        rows = [(text, t) for text in texts for t in range(text.context, text.context + text.length)]
        hidden = None
        if any(text.branches for text in texts):
            own = [[t for t in (*text.branches, i) if t <= i and text.branch(t) == text.branch(i)] for text, i in rows]
            shared = [min([i, *text.branches[:1]]) for text, i in rows]
            starts = [i if not text.branch(i) else min(some) for (text, i), some in zip(rows, own, strict=True)]
            hidden = np.array(shared), np.array(starts)
        return PromptRows.build(
            [text.context for text in texts],
            [text.length for text in texts],
            [text.table for text in texts],
            self.block_size,
            np.array([text.position(t) for text, t in rows]),
            np.array([text.table[t // self.block_size] * self.block_size + t % self.block_size for text, t in rows]),
            hidden,
        )

    def check(self, text: Text, found: Tensor) -> None:
        """`found` against float64, with the keys and values that are in the cache."""
        first, end = text.context, text.context + text.length
        whole = text.places(0, end, self.block_size)
        keys, values = (pool[whole].double() for pool in self.plain())
        half = found.dtype is torch.bfloat16
        written = rotated(text.keys[first:].double(), self.rope, text, first)
        if self.scales is None:
            torch.testing.assert_close(keys[first:], written, rtol=2**-8 if half else 1e-5, atol=1e-5)
            assert torch.equal(values[first:], text.values[first:].double())
        else:
            self.check_codes(text, written)
        hidden = ~text.visible()[first:, None]
        q = rotated(text.q[first:].double(), self.rope, text, first)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhw,thw->qht", q, k) * self.scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected, size = (torch.einsum("qht,thw->qhw", weights, x) for x in (v, v.abs()))
        # scores are rounded, as is a rotated query of bfloat16 before them, and weights move by as much; so are keys of
        # an int8 cache where products are of bfloat16
        moved = 2.0**-8 if half and (self.rope is not None or self.scales is not None) else 2.0**-20
        sizes = torch.einsum("qhw,thw->qht", q.abs(), k.abs()) * self.scale
        slack = moved * sizes.masked_fill(hidden, 0).amax(-1, keepdim=True)
        rounding = 2.0**-8 if half else 0.0
        allowed = rounding * (size + expected.abs()) + slack * size + 1e-5 * size + 1e-6
        assert ((found.double() - expected).abs() <= allowed).all()

    def check_codes(self, text: Text, written: Tensor) -> None:
        """New tokens' in an int8 cache: to the bit those of the reference, but for a rotation that rounds elsewhere."""
        assert self.scales is not None
        places = text.places(text.context, text.context + text.length, self.block_size)
        for pool, scales, rows in zip((self.keys, self.values), self.scales, (text.keys, text.values), strict=True):
            if pool is self.values or self.rope is None:
                codes, expected = quantize_rows(rows[text.context :])
                assert torch.equal(pool[places], codes) and torch.equal(scales[places], expected)
            else:
                step = scales[places].double()[..., None]
                assert ((pool[places] * step - written).abs() <= 0.502 * step).all()


def rotated(x: Tensor, rope: Tensor | None, text: Text, first: int) -> Tensor:
    """x [tokens, heads, width], from token `first` of a text on: neighbours as complex numbers times the rope at their
    position; float64 computed, of x's dtype."""
    if rope is None:
        return x
    positions = torch.tensor([text.position(first + i) for i in range(len(x))], dtype=torch.long)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rope[positions][:, None].to(torch.complex128)).flatten(-2).to(x.dtype)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Cache, list[Text]]:
    """Decode rows and prompt chunks in one step."""
    name = draw(st.sampled_from(ATTENTION_NAMES))
    dtype = draw(st.sampled_from(DTYPES))
    block_size = draw(st.sampled_from([32, 64, 128, 96, 2]))
    prefix = draw(st.integers(0, 1))
    heads, key_heads, value_heads = draw(st.sampled_from(SHAPES))
    key_width, value_width = draw(st.sampled_from([(64, 64), (32, 96), (96, 32), (32, 160)]))
    if dtype is torch.float32:
        key_width, value_width = draw(st.sampled_from([(key_width, value_width), (16, 48)]))
    size = draw(st.sampled_from([1.0, 30.0]))  # 30: scores far apart, where a softmax without a maximum overflows
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    texts = []
    for decode, (context, length) in [
        *((True, (draw(st.integers(0, 300)), 1)) for _ in range(draw(st.integers(0, 3)))),
        *((False, draw(st.tuples(st.integers(0, 200), st.integers(1, 90)))) for _ in range(draw(st.integers(0, 2)))),
    ] or [(True, (5, 1))]:
        context += prefix * block_size
        end = context + length
        branches: tuple[int, ...] = ()
        if not decode and draw(st.booleans()):
            branches = tuple(sorted(draw(st.sets(st.integers(1, end), min_size=1, max_size=3))))

        def normal(heads: int, width: int, end: int = end) -> Tensor:
            return torch.randn(end, heads, width, generator=generator).to(dtype)

        q = normal(heads, key_width) * size
        texts.append(
            Text(context, length, decode, branches, q, normal(key_heads, key_width), normal(value_heads, value_width))
        )
    if prefix:  # a common beginning, in common blocks
        common = prefix * block_size
        for text in texts:
            text.keys[:common], text.values[:common] = texts[0].keys[:common], texts[0].values[:common]
            text.branches = tuple(start for start in text.branches if start >= common)
    rope = None
    if draw(st.booleans()):
        longest = max(text.context + text.length for text in texts)
        angles = torch.randn(longest, key_width // 2, generator=generator) * 3
        rope = torch.polar(torch.ones_like(angles), angles)
    return Cache.build(name, texts, block_size, rope, rng, prefix, draw(st.booleans())), texts


@given(steps())
def test_a_step(step: tuple[Cache, list[Text]]) -> None:
    """Against float64; and nothing else in the cache has changed."""
    cache, texts = step
    before = cache.copy()
    found = cache.run(texts)
    pools = list(zip(cache.pools(), before.pools(), strict=True))
    for text, rows in zip(texts, found, strict=True):
        cache.check(text, rows)
        places = text.places(text.context, text.context + text.length, cache.block_size)
        for now, then in pools:
            now[places] = then[places]
    for now, then in pools:
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


@given(steps(), st.randoms(use_true_random=False))
def test_a_row_depends_on_nothing_but_itself(step: tuple[Cache, list[Text]], rng: random.Random) -> None:
    """To the bit, whatever is beside it and however its prompt is cut into chunks."""
    cache, texts = step
    together = cache.copy()
    found = together.run(texts)
    for text, rows in zip(texts, found, strict=True):
        if text.decode:
            assert torch.equal(cache.copy().run([text])[0], rows)
            continue
        alone = cache.copy()
        cuts = sorted({text.context, *(rng.randint(text.context, text.context + text.length) for _ in range(3))})
        pieces = zip(cuts, [*cuts[1:], text.context + text.length], strict=True)
        parts = [alone.run([text.part(start, end - start, False)])[0] for start, end in pieces if end > start]
        assert torch.equal(torch.cat(parts), rows)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
@pytest.mark.parametrize("shape", [(12, 1, 1), (16, 4, 2), (4, 4, 4)])
def test_heads_that_share_keys_or_values(name: str, shape: tuple[int, int, int]) -> None:
    """In bfloat16, which tiles may multiply: with every kind of last tokens, among numbers that are NaN."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for context in (0, 1, 14, 15, 16, 31, 32, 46, 63, 64, 97, 128, 300):
        q, keys, values = (
            torch.randn(context + 1, heads, width, generator=generator).bfloat16()
            for heads, width in zip(shape, (64, 64, 96), strict=True)
        )
        texts.append(Text(context, 1, True, (), q, keys, values))
    cache = Cache.build(name, texts, 64, None, random.Random(0))
    for text, rows in zip(texts, cache.run(texts), strict=True):
        cache.check(text, rows)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ATTENTION_NAMES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(name: str, dtype: torch.dtype, is_int8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [
        Text(
            context,
            length,
            length == 1,
            (),
            torch.randn(context + length, 8, 64, generator=generator).to(dtype),
            torch.randn(context + length, 8, 64, generator=generator).to(dtype),
            torch.randn(context + length, 1, 128, generator=generator).to(dtype),
        )
        for context, length in ((700, 1), (300, 1), (0, 1), (129, 1), (256, 150), (0, 77))
    ]
    cache = Cache.build(name, texts, 64, None, random.Random(0), is_int8=is_int8)
    many = [torch.cat(cache.copy().run(texts)) for _ in range(4)]
    torch.set_num_threads(1)
    one = torch.cat(cache.copy().run(texts))
    assert not one.isnan().any()
    assert all(torch.equal(found, one) for found in many)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_extreme_rows_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """To the bit: zeros, denormals, halves between codes, the largest numbers; what is not finite has such a scale."""
    halves = torch.cat((torch.tensor([127.0]), torch.arange(31) - 15.5))  # a scale of 1
    ramp = torch.linspace(-1, 1, 32)
    last = torch.tensor([0.0] * 31 + [1.0])
    rows = [ramp * 0, halves, ramp, ramp * 1e-40, ramp * 3e-38, ramp * 3e38, last, last * torch.inf, last * torch.nan]
    values = torch.stack(rows).to(dtype)[:, None]
    text = Text(0, len(rows), False, (), torch.ones(len(rows), 1, 32, dtype=dtype), values, values.flip(2))
    cache = Cache.build(name, [text], 32, None, random.Random(0), is_int8=True)
    cache.run([text])
    keys, values_found, *scales = (pool[text.table[0], 0, : len(rows)] for pool in cache.pools())
    for found, found_scales, wanted in zip((keys, values_found), scales, (values, values.flip(2)), strict=True):
        codes, expected = quantize_rows(wanted[:, 0])
        assert torch.equal(found[:7], codes[:7]) and torch.equal(found_scales[:7], expected[:7])
        assert not found_scales[7:].isfinite().any()


def test_shapes_that_no_kernel_takes() -> None:
    def fields(key_width: int, dtype: torch.dtype = torch.bfloat16, heads: int = 4, **scales: Tensor) -> object:
        keys, values = torch.zeros(3, 2, 64, key_width, dtype=dtype), torch.zeros(3, 2, 64, 64, dtype=dtype)
        q, out = torch.zeros(1, heads, key_width, dtype=dtype), torch.zeros(1, heads, 64, dtype=dtype)
        new_keys, new_values = torch.zeros(1, 2 * key_width, dtype=dtype), torch.zeros(1, 128, dtype=dtype)
        return layer_fields(q, new_keys, new_values, keys, values, out, 1.0, rope=None, **scales)

    assert fields(64) and fields(48, torch.float32)
    with pytest.raises(ValueError, match="multiples of 32"):
        fields(48)
    with pytest.raises(ValueError, match="do not fit"):
        fields(64, heads=3)
    with pytest.raises(ValueError, match="float16"):
        fields(64, torch.float16)
    with pytest.raises(ValueError, match=r"pools of torch.bfloat16 .*, not torch.int8"):
        fields(64, key_scales=torch.zeros(3, 2, 64, dtype=torch.bfloat16))
