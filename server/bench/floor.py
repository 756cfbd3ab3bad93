"""The least time of a step's work on this machine (roofline): bytes at memory bandwidth, operations at GEMM speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lpa_model.backends.cuda.check import times
from lpa_model.cache import bytes_per_token
from lpa_model.config import CacheLayout, LPAConfig
from lpa_model.quantization import WeightType, bytes_of, weight_type

REPEATS = 20
GEMM_ROWS = 1024
GPU_REPEATS = 10


@dataclass(frozen=True)
class Machine:
    """Speeds measured in this run."""

    bandwidth: float  # bytes a second
    gemm: float  # operations a second, a multiply-add being two


@dataclass(frozen=True)
class Work:
    """Bytes that have to be read and operations that have to be done."""

    bytes: float
    operations: float

    def seconds(self, machine: Machine) -> float:
        """The least time, memory and arithmetic overlapping without a gap."""
        return max(self.bytes / machine.bandwidth, self.operations / machine.gemm)


def measure_machine(config: LPAConfig, dtype: torch.dtype) -> Machine:
    """Read as many bytes as the model has; multiply GEMM_ROWS rows by its largest shape outside the head."""
    data = torch.ones(config.parameter_count() * dtype.itemsize // 4)
    read = _best(lambda: data.sum())
    weights = torch.ones(config.intermediate_size, config.hidden_size, dtype=dtype)
    x = torch.ones(GEMM_ROWS, config.hidden_size, dtype=dtype)
    multiply = _best(lambda: F.linear(x, weights))
    return Machine(data.nbytes / read, 2 * GEMM_ROWS * weights.numel() / multiply)


def measure_gpu(device: torch.device, dtype: torch.dtype, size: int = 1 << 30, side: int = 8192) -> Machine:
    """Bytes that a copy of `size` bytes reads and writes a second; operations a second of a product of squares.

    Its caches would hold a small model whole.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, dtype=dtype, device=device)
    copy = min(times(lambda: target.copy_(source), device, GPU_REPEATS))
    multiply = min(times(lambda: a @ a, device, GPU_REPEATS))
    return Machine(2 * size / copy, 2 * side**3 / multiply)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def decode_work(
    config: LPAConfig, layout: CacheLayout, cache_dtype: torch.dtype, weights: WeightType, batch: int, context: int
) -> Work:
    """One token for each of `batch` sequences that have `context` tokens in the cache."""
    cached = bytes_per_token(config, layout, cache_dtype) * batch * context
    products = batch * (_body(config) + _head(config))
    attention = sum(_decode_attention(config, layout, layer) for layer in range(config.num_hidden_layers))
    return Work(_weight_bytes(config, weights) + cached, 2 * (products + batch * context * attention))


def prompt_work(config: LPAConfig, weights: WeightType, batch: int, length: int, logit_rows: int) -> Work:
    """`batch` prompts of `length` tokens from nothing, with logits of `logit_rows` rows of each."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * length * (length + 1)
    operations = 2 * batch * (length * _body(config) + logit_rows * _head(config) + attention)
    return Work(_weight_bytes(config, weights), operations)


def _weight_bytes(config: LPAConfig, weights: WeightType) -> float:
    head = bytes_of(weight_type(weights, is_head=True))
    return _body(config) * bytes_of(weights) + _head(config) * head


def _head(config: LPAConfig) -> int:
    return config.vocab_size * config.hidden_size


def _body(config: LPAConfig) -> int:
    """Weights in the matrices that every token is multiplied by, without the head."""
    layers = range(config.num_hidden_layers)
    return sum(config.weight_count(name, layer) for layer in layers for name in config.projections)


def _decode_attention(config: LPAConfig, layout: CacheLayout, layer: int) -> int:
    """Multiply-adds of one query and one cached token."""
    keys_latent, values_latent = config.cache_forms(layout, layer)
    full = config.num_attention_heads * config.head_size
    keys = values = full
    if keys_latent:
        rank = config.rank("k", layer) or 0
        # rotary keys are rebuilt before QK^T
        keys = full + rank * config.kv_heads * config.head_size if config.rotary else config.num_attention_heads * rank
    if values_latent:
        values = config.num_attention_heads * (config.rank("v", layer) or 0)
    return keys + values
