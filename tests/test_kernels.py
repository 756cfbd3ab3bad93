"""The compiled kernels against plain torch, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpa_model.backends.cpu import kernels
from lpa_model.backends.cpu.kernels import launch, programs, records
from lpa_model.backends.cpu.kernels.attention import (
    KERNELS,
    DecodeRows,
    call_of_layer,
    decode_attention,
    scratch_of_step,
)
from lpa_model.backends.cpu.kernels.launch import Kernel, compile_kernel
from lpa_model.backends.cpu.kernels.prompts import NO_PROMPTS
from lpa_model.backends.cpu.packed import CompiledRMSNorm
from lpa_model.backends.features import instruction_sets
from lpa_model.layers import RMSNorm
from tests.conftest import in_pairs, out_of_pairs

SCALE = 0.7


PROGRAMS = [programs.KERNELS[name] for name in instruction_sets() if name in programs.KERNELS]
NAMES = [*KERNELS.values(), *PROGRAMS]


def kernel_of(name: str) -> Kernel:
    kernel = compile_kernel(name).result()
    assert kernel is not None
    return kernel


@dataclass
class Step:
    """Single queries over a cache in which all numbers are NaN that nobody has written."""

    kernel: str
    q: Tensor
    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor
    lengths: list[int]
    tables: list[list[int]]
    turns: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None

    def run(self, rows: list[int]) -> Tensor:
        """Some of the queries, in the order of `rows`."""
        lengths = np.array([self.lengths[row] for row in rows])
        tables = [self.tables[row] for row in rows]
        at = DecodeRows.build(lengths - 1, lengths, tables, self.keys.shape[2])
        if self.kernel in PROGRAMS:
            return self.run_program(rows, at)
        return decode_attention(
            kernel_of(self.kernel),
            self.q[rows],
            self.new_keys[rows],
            self.new_values[rows],
            self.keys,
            self.values,
            at,
            SCALE,
            turns=self.turns,
            up=self.up,
            up_bias=self.up_bias,
        )

    def run_program(self, rows: list[int], at: DecodeRows) -> Tensor:
        """The same by a program that does nothing else."""
        heads, width = self.q.shape[1], self.values.shape[3]
        q, keys, values = self.q[rows], self.new_keys[rows], self.new_values[rows]
        pool, out = in_pairs(self.values), torch.empty(len(rows), heads, width, dtype=torch.bfloat16)
        partial = torch.full((len(at.item_rows) * heads * (width + 2),), torch.nan)
        counters = np.zeros(at.num_counters, dtype=np.int64)
        program = programs.Program(np.zeros(1, dtype=records.CALL))
        program.attention()
        program.widest = max(q.shape[2] * heads, width)
        call = call_of_layer(q, keys, values, self.keys, pool, out, SCALE, turns=self.turns)
        scratch = scratch_of_step(partial, len(at.item_rows) * heads * width)
        for name, value in (NO_PROMPTS | call | at.fields | scratch).items():
            program.calls[name] = value
        program.calls["counters"] = counters.ctypes.data
        program.run(kernel_of(self.kernel), len(rows))
        self.values.copy_(out_of_pairs(pool))
        return out

    def expected(self, row: int) -> tuple[Tensor, Tensor]:
        """Token by token in float64, after the step's own keys and values have been written.

        Beside it how far rounding may lead from it: in proportion to the same with absolute values.
        """
        rounding = 2.0**-8 if self.q.dtype is torch.bfloat16 else 0.0
        length, table = self.lengths[row], self.tables[row]
        _, key_heads, block_size, _ = self.keys.shape
        q = self.q[row].double()
        if self.turns is not None:
            q = turned(q, self.turns[length - 1])
        tokens = [(table[t // block_size], t % block_size) for t in range(length)]
        rows, sizes = [], []
        for head in range(len(q)):
            k = torch.stack([self.keys[b, head * key_heads // len(q), o] for b, o in tokens]).double()
            v = torch.stack([self.values[b, head * self.values.shape[1] // len(q), o] for b, o in tokens]).double()
            weights = (k @ q[head] * SCALE).softmax(0)
            out, size = weights @ v, weights @ v.abs()
            # scores are rounded, as is a turned query of bfloat16 before them, and weights move by as much
            moved = 2.0**-8 if self.turns is not None and self.q.dtype is torch.bfloat16 else 2.0**-20
            slack = moved * (k.abs() @ q[head].abs() * SCALE).max()
            if self.up is not None:
                g = head * len(self.up) // len(q)
                up = self.up[g].double()
                out, size = up @ out, up.abs() @ size
                if self.up_bias is not None:
                    out = out + self.up_bias.view(len(self.up), -1)[g].double()
            rows.append(out)
            sizes.append(rounding * (size + out.abs()) + slack * size)
        return torch.stack(rows), torch.stack(sizes)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [.., width] with neighbours turned by turns complex64 [width / 2]."""
    cos, sin = turns.real.double(), turns.imag.double()
    a, b = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    kernel = draw(st.sampled_from(NAMES))
    in_program = kernel in PROGRAMS
    block_size = draw(st.sampled_from([32, 64, 128, 256, 96] if in_program else [1, 3, 8, 64, 128, 200]))
    prefix = draw(st.integers(0, 2))  # blocks shared by all
    lengths = draw(st.lists(st.integers(prefix * block_size + 1, prefix * block_size + 300), min_size=1, max_size=5))
    heads, key_heads, value_heads = draw(
        st.sampled_from([(4, 4, 4), (8, 2, 2), (8, 1, 1), (12, 12, 1), (16, 1, 1), (20, 1, 1), (6, 1, 3), (12, 2, 4)])
    )
    dtype = torch.float32 if kernel == KERNELS[torch.float32] else torch.bfloat16
    widths = [(64, 64), (32, 96), (96, 32)] if in_program else [(64, 64), (32, 96), (2, 5), (8, 16), (6, 33)]
    key_width, value_width = draw(st.sampled_from(widths))
    up_width = 0 if in_program else draw(st.sampled_from([0, 7, 16]))
    size = draw(st.sampled_from([1.0, 30.0]))  # 30: scores far apart, where a softmax without a maximum overflows
    seed = draw(st.integers(0, 1 << 30))
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    needed = [-(-length // block_size) - prefix for length in lengths]
    total = prefix + sum(needed) + 3
    free = rng.sample(range(total), total)
    common = [free.pop() for _ in range(prefix)]
    tables = [common + [free.pop() for _ in range(count)] for count in needed]
    keys = torch.full((total, key_heads, block_size, key_width), float("nan"), dtype=dtype)
    values = torch.full((total, value_heads, block_size, value_width), float("nan"), dtype=dtype)
    for length, table in zip(lengths, tables, strict=True):
        for i, block in enumerate(table):
            filled = max(0, min(block_size, length - 1 - i * block_size))
            keys[block, :, :filled] = normal(key_heads, filled, key_width)
            values[block, :, :filled] = normal(value_heads, filled, value_width)
    rows = len(lengths)
    wide = normal(rows, key_heads * key_width + 3 + value_heads * value_width)  # as one product leaves them
    return Step(
        kernel=kernel,
        q=normal(rows, heads, key_width) * size,
        new_keys=wide[:, : key_heads * key_width],
        new_values=wide[:, key_heads * key_width + 3 :],
        keys=keys,
        values=values,
        lengths=lengths,
        tables=tables,
        turns=torch.polar(torch.ones(max(lengths), key_width // 2), normal(max(lengths), key_width // 2).float() * 3)
        if draw(st.booleans())
        else None,
        up=normal(value_heads if value_heads > 1 else heads, up_width, value_width) / 4 if up_width else None,
        up_bias=normal((value_heads if value_heads > 1 else heads) * up_width) if draw(st.booleans()) else None,
    )


@given(steps())
@settings(max_examples=60, deadline=None)
def test_decode_attention(step: Step) -> None:
    count = len(step.lengths)
    block_size = step.keys.shape[2]
    before = step.keys.clone(), step.values.clone()
    found = step.run(list(range(count)))
    rounding = 2.0**-8 if step.q.dtype is torch.bfloat16 else 0.0
    for row in range(count):
        expected, allowed = step.expected(row)
        assert ((found[row] - expected).abs() <= allowed + 1e-4).all()
    # the step's own tokens are in the cache, and nothing else has changed
    for row, length in enumerate(step.lengths):
        block, offset = step.tables[row][(length - 1) // block_size], (length - 1) % block_size
        key = step.new_keys[row].view(step.keys.shape[1], -1).double()
        if step.turns is not None:
            key = turned(key, step.turns[length - 1])
        torch.testing.assert_close(step.keys[block, :, offset].double(), key, rtol=rounding, atol=1e-5)
        assert torch.equal(step.values[block, :, offset].flatten(), step.new_values[row])
        before[0][block, :, offset] = step.keys[block, :, offset]
        before[1][block, :, offset] = step.values[block, :, offset]
    torch.testing.assert_close((step.keys, step.values), before, rtol=0, atol=0, equal_nan=True)


@given(steps(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_a_row_depends_on_nothing_but_itself(step: Step, rng: random.Random) -> None:
    """To the bit: alone or beside others, in any order."""
    together = step.run(list(range(len(step.lengths))))
    for row in range(len(step.lengths)):
        assert torch.equal(step.run([row])[0], together[row])
    order = rng.sample(range(len(step.lengths)), len(step.lengths))
    assert torch.equal(step.run(order), together[order])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernel", NAMES)
def test_threads_change_nothing(kernel: str) -> None:
    dtype = torch.float32 if kernel == KERNELS[torch.float32] else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    lengths = [700, 5, 1000, 129, 128]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    step = Step(
        kernel=kernel,
        q=normal(5, 12, 64),
        new_keys=normal(5, 12 * 64),
        new_values=normal(5, 128),
        keys=normal(60, 12, 64, 64),
        values=normal(60, 1, 64, 128),
        lengths=lengths,
        tables=[list(range(12 * i, 12 * i + 12)) for i in range(2)] + [list(range(24, 40))] + [[50, 51, 52], [53, 54]],
        turns=None,
        up=None if kernel in PROGRAMS else normal(12, 64, 128) / 8,
        up_bias=None,
    )
    found = [step.run(list(range(5))) for _ in range(20)]
    torch.set_num_threads(1)
    alone = step.run(list(range(5)))
    assert all(torch.equal(one, alone) for one in found)


@pytest.mark.parametrize("rows", [1, 8, 50])
def test_rms_norm(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    plain = RMSNorm(96, 1e-6).to(torch.bfloat16).requires_grad_(False)
    plain.weight.normal_(generator=generator)
    compiled = CompiledRMSNorm(plain)
    assert compiled.kernel.result() is not None
    x = torch.randn(rows, 96, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    found = compiled(x)
    torch.testing.assert_close(found, plain(x), rtol=2**-7, atol=0)  # at most a bit where x's sum is rounded elsewhere
    for row in range(rows):
        assert torch.equal(compiled(x[row : row + 1]), found[row : row + 1])


FALLBACK = """
import logging, sys
if {absent}:
    sys.modules["numba"] = None
import torch
from lpa_model.backends.cpu.kernels import attention
from lpa_model.backends.cpu.kernels.launch import compile_kernel
from lpa_model.backends.cpu.packed import packed_backend
from lpa_model.batch import Batch, Span
from tests.conftest import random_model, tiny_config

logging.basicConfig()
backend = packed_backend(random_model(tiny_config()))
backend.make_cache("mixed", 4, 8)
for span in (Span(0, 3, [1], False), Span(3, 1, [1], True)):
    step = backend.submit(Batch.build(range(span.length), [span], 8), [])
assert step.hidden.isfinite().all()
assert compile_kernel(attention.KERNELS[torch.float32]).result() is None
print("done")
"""


@pytest.mark.parametrize("absent", [True, False])
def test_torch_does_it_without_numba(absent: bool, tmp_path: Path) -> None:
    """Not installed, or one that does not work here."""
    (tmp_path / "numba.py").write_text("raise ImportError('needs another numpy')")
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK.format(absent=absent)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        cwd=root,
    )
    assert done.stdout == "done\n", done.stderr
    assert ("so that plain torch does its work: needs another numpy" in done.stderr) == (not absent)


CACHED = """
import sys
from lpa_model.backends.cpu.kernels.launch import _folder, compile_kernel
kernel = compile_kernel("lpa_model.backends.cpu.kernels.norm.rms_norm_bfloat16").result()
assert kernel is not None
print("numba" in sys.modules, _folder())
"""


def test_what_is_compiled_at_installation_is_read(tmp_path: Path) -> None:
    """Without numba; what cannot be kept is compiled every time."""

    def compiled_in(folder: Path) -> tuple[bool, Path]:
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        compiled, where = done.stdout.split(maxsplit=1)
        return compiled == "True", Path(where.strip())

    compiled, folder = compiled_in(tmp_path / "cache")
    assert compiled and folder.parent == tmp_path / "cache"
    assert [file.name for file in folder.iterdir()] == ["lpa_model.backends.cpu.kernels.norm.rms_norm_bfloat16"]
    assert compiled_in(tmp_path / "cache") == (False, folder)
    # a file where a folder should be is a place that root cannot write to either
    (tmp_path / "blocked").write_text("")
    assert compiled_in(tmp_path / "blocked")[0]


def test_machine_code_that_is_damaged_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "kernel"
    assert launch._kept(file) is None
    launch._keep(b"code", file)
    assert launch._kept(file) == b"code"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:10], whole[:-1] + b"E", bytes(len(whole))):
        file.write_bytes(damaged)
        assert launch._kept(file) is None


def test_nothing_imports_numba_at_start() -> None:
    code = "import sys, server.cli, server.engine.engine; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(kernels.__file__).parents[4])
