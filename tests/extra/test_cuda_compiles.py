"""Triton kernels compiled for a GPU that is not there: what its interpreter does not check, types and shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.documents import ROOT

SHARED_MEMORY = 227 * 1024  # bytes of one program on sm_90

# Whole steps whose launches compile and do nothing; in a process of its own, since an import decides how kernels run.
SCRIPT = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Device:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

driver.set_active(Device())
launch = JITFunction.run

def compiled(kernel, *args, grid, warmup, **options):
    found = launch(kernel, *args, grid=grid, warmup=True, **options)
    print(kernel.fn.__name__, found.metadata.shared, found.hash, flush=True)

JITFunction.run = compiled

from lpa_model.backends.cuda.kernels import kernels
from lpa_model.backends.cuda.rows import StepBuffers, step_rows
from lpa_model.backends.cuda.step import decode_step, mixed_step
from lpa_model.backends.cuda.weights import UNIT, Weights
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from lpa_model.config import LPAConfig
from lpa_model.model import LPAForCausalLM

architecture, size, heads, kv_heads, rank, layout, dtype = sys.argv[1:]
config = LPAConfig(
    architecture=architecture, vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
    max_position_embeddings=512, head_dim=int(size), num_attention_heads=int(heads), num_key_value_heads=int(kv_heads),
    attention_rank=int(rank) or None,
)
with torch.inference_mode():
    model = LPAForCausalLM(config).to(getattr(torch, dtype))
    if model.rotary is not None:
        model.rotary.build(config, torch.device("cpu"))
    cache = LatentCache(config, layout, 4, 64, getattr(torch, dtype), width_unit=UNIT)
    weights = Weights(model, cache.forms)
    decode, prompt = Span(70, 1, [1, 2], True), Span(9, 20, [3], False)
    for rows in (1, 3, 16):
        buffers = StepBuffers(rows, 8, torch.device("cpu"))
        buffers.fill(Batch.build([1], [decode], 64))
        decode_step(weights, cache, buffers, kernels(True))
    rows = step_rows(Batch.build([1] * 21, [decode, prompt], 64), torch.device("cpu"))
    mixed_step(weights, cache, rows, kernels(True))
"""

CASES = {
    "130m": ("setting2", 64, 12, 12, 128, "mixed", "bfloat16"),
    "370m": ("setting1", 128, 8, 8, 256, "latent", "bfloat16"),
    "rebuilt": ("setting2", 64, 12, 12, 128, "latent", "bfloat16"),
    "rebuilt from wide latents": ("setting2", 128, 8, 8, 1024, "latent", "bfloat16"),
    "widest": ("setting2", 256, 8, 1, 0, "full", "bfloat16"),
    "float32": ("setting2", 128, 8, 2, 256, "mixed", "float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_once_and_fit(case: str) -> None:
    run = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, CASES[case])]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(run, cwd=ROOT, env=compiling, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert {"_attend", "_merge", "_attend_prompt", "_linear", "_rotate_and_write"} <= {name for name, *_ in found}
    for name, shared, _ in found:
        assert int(shared) <= SHARED_MEMORY, (name, shared)
    variants = {name: len({h for other, _, h in found if other == name}) for name, *_ in found}
    assert variants["_attend"] == variants["_merge"] == variants["_attend_prompt"] == 1, variants
