"""On the device itself: every operation beside its twin, and the time of the one that reads the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.rows import Decodes, StepBuffers, step_rows
from lpa_model.backends.cuda.step import decode_step, head, mixed_step
from lpa_model.backends.cuda.twins import TWINS
from lpa_model.backends.cuda.weights import UNIT, Weights
from lpa_model.batch import Batch, Span
from lpa_model.cache import LatentCache
from lpa_model.config import CacheLayout
from lpa_model.model import LPAForCausalLM


def operations(run_kernels: bool) -> Ops:
    """The kernels, where this process can run them: on a GPU, or in Triton's interpreter; else their twins."""
    if not run_kernels:
        return TWINS
    from lpa_model.backends.cuda.kernels import kernels

    return kernels(batch_invariant=False)


class Beside:
    """Operations that compute by kernel and by twin, go on with the kernel's result, and keep the largest difference.

    A difference is relative to the largest number of the twin's, or to 1 if that is more.
    """

    def __init__(self, ops: Ops) -> None:
        self.worst: dict[str, float] = {}
        self.ops = Ops(*(self._both(name, getattr(ops, name), getattr(TWINS, name)) for name in Ops._fields))

    def _both(self, name: str, kernel: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> Any:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            expected, found = twin(*copies), kernel(*arguments)
            written = [(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, Tensor)]
            for ours, theirs in [*written, *([] if found is None else [(found, expected)])]:
                self._keep(name, ours, theirs)
            return found

        return both

    def _keep(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        if not theirs.is_floating_point() or not theirs.numel():
            return
        size = max(1.0, float(theirs.float().abs().max()))
        difference = float((ours.float() - theirs.float()).abs().max()) / size
        # a NaN is worse than any number
        self.worst[name] = max(self.worst.get(name, 0.0), float("inf") if difference != difference else difference)


@torch.inference_mode()
def differences(model: LPAForCausalLM, layout: CacheLayout, block_size: int, ops: Ops) -> dict[str, float]:
    """The largest relative difference of each operation over steps of a model: prompts, their continuation beside
    generated tokens, and generated tokens alone with padding rows."""
    device = model.embed_tokens.weight.device
    blocks = -(-model.config.max_position_embeddings // block_size)
    cache = LatentCache(
        model.config,
        layout,
        3 * blocks,
        block_size,
        model.embed_tokens.weight.dtype,
        partial(torch.zeros, device=device),
        UNIT,
    )
    weights, beside = Weights(model, cache.forms), Beside(ops)
    tables = [list(range(i, 3 * blocks, 3)) for i in range(3)]
    length = min(2 * block_size + 5, model.config.max_position_embeddings - 8)
    ids = torch.randint(0, model.config.vocab_size, (3 * length,), generator=torch.Generator().manual_seed(0)).tolist()

    def mixed(spans: list[Span]) -> None:
        batch = Batch.build(ids[: sum(span.length for span in spans)], spans, block_size)
        hidden = mixed_step(weights, cache, step_rows(batch, device), beside.ops)
        head(weights, hidden, beside.ops)

    mixed([Span(0, length, tables[0], False), Span(0, length // 2, tables[1], False)])
    mixed([Span(length, 1, tables[0], True), Span(length // 2, length // 2, tables[1], False)])
    mixed([Span(0, length, tables[2], False, (length // 2, length // 2 + 7))])
    buffers = StepBuffers(4, blocks, device)
    spans = [Span(length + 1, 1, tables[0], True), Span(2 * (length // 2), 1, tables[1], True)]
    buffers.fill(Batch.build(ids[:2], spans, block_size))
    head(weights, decode_step(weights, cache, buffers, beside.ops), beside.ops)
    return beside.worst


@torch.inference_mode()
def attention_times(
    model: LPAForCausalLM, layout: CacheLayout, rows: int, context: int, block_size: int, ops: Ops, repeats: int
) -> tuple[list[float], int]:
    """Seconds of decode attention in one layer, and the bytes of keys and values that it reads."""
    weight = model.embed_tokens.weight
    blocks = -(-context // block_size)
    cache = LatentCache(
        model.config, layout, rows * blocks, block_size, weight.dtype, partial(torch.zeros, device=weight.device), UNIT
    )
    layer, keys, values = Weights(model, cache.forms).layers[0], cache.keys[0], cache.values[0]
    keys.normal_()
    values.normal_()
    width = layer.absorbed.weight.shape[1] if layer.absorbed is not None else keys.shape[3]
    if layer.rebuilt is not None:
        width = layer.rebuilt.weight.shape[1]
    q = torch.randn(rows, layer.num_heads, width, dtype=weight.dtype, device=weight.device)
    out = q.new_empty(rows, layer.num_heads, values.shape[3])
    tables = torch.arange(rows * blocks, dtype=torch.int32, device=weight.device).view(rows, blocks)
    decodes = Decodes(torch.full((rows,), context, dtype=torch.int32, device=weight.device), tables)

    def attend() -> None:
        ops.decode_attention(q, keys, values, decodes, layer.scale, layer.rebuilt, out)

    per_token = sum(pool.shape[1] * pool.shape[3] * pool.element_size() for pool in (keys, values))
    return times(attend, weight.device, repeats), per_token * rows * context


def times(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of some runs after two that do not count; on a GPU by its own clock, launches among them."""
    found = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
        if number >= 2:
            found.append(seconds)
    return found
