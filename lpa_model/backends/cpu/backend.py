"""The CPU backend: steps as op lists over packed weights, kernels for sampling and scoring."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lpa_model.backends import features
from lpa_model.backends.base import Mask, SamplingRow, StepResult
from lpa_model.backends.cpu import library
from lpa_model.backends.cpu.logits import row_ops
from lpa_model.backends.cpu.plan import WIDTH_UNIT, StepPlan
from lpa_model.backends.torch.results import ComputedStep, step_result
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache, bytes_per_token
from lpa_model.config import CacheLayout
from lpa_model.model import LPAForCausalLM

MOST_ROWS = 512  # of one run of the op list: so many stay in the cores' caches from one operation to the next


class CpuBackend:
    """`Backend` whose steps are op lists; a row's bits depend on the row alone."""

    batch_invariant = True
    runs_ahead = False

    def __init__(
        self,
        model: LPAForCausalLM,
        instruction_set: str,
        held: torch.dtype,
        name: str,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        """`held`: what weights are packed as, unless they are quantised. `dtype`: of activations. `cache_dtype`: the
        same, or int8."""
        self.config = model.config
        self.name, self.cache_dtype = name, cache_dtype
        self._model: LPAForCausalLM | None = model  # until its weights are packed
        self._instruction_set, self._held, self._dtype = instruction_set, held, dtype
        self._ops = row_ops(instruction_set)
        self._plan: StepPlan | None = None
        self._cache: LatentCache | None = None

    def cache_bytes_per_token(self, layout: CacheLayout) -> int:
        return bytes_per_token(self.config, layout, self.cache_dtype, WIDTH_UNIT)

    def free_memory(self) -> int:
        return features.free_memory(torch.device("cpu"))

    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        """The pools; and weights are packed, since the op list points to both."""
        assert self._model is not None, "the cache is made once"
        self._cache = LatentCache(
            self.config, layout, num_blocks, block_size, self.cache_dtype, _untouched_zeros, WIDTH_UNIT
        )
        kernels = library.load().kernels(self._instruction_set)
        self._plan = StepPlan(self._model, self._cache, kernels, self._held, self._dtype)
        self._model = None
        return self._cache

    @torch.inference_mode()
    def submit(self, batch: Batch, sampling: Sequence[SamplingRow]) -> ComputedStep:
        assert self._cache is not None and self._plan is not None
        if len(batch.zero_blocks):
            self._cache.zero(torch.from_numpy(batch.zero_blocks))
        if batch.num_rows <= MOST_ROWS:
            return ComputedStep(batch, sampling, *self._plan(batch))
        parts = [(hidden.clone(), inner) for hidden, inner in map(self._plan, batch.cut(MOST_ROWS))]
        inner = {layer: torch.cat([states[layer] for _, states in parts]) for layer in parts[0][1]}
        return ComputedStep(batch, sampling, torch.cat([hidden for hidden, _ in parts]), inner)

    def wait(self, handle: ComputedStep) -> None:
        """`submit` has computed it."""

    @torch.inference_mode()
    def collect(self, handle: ComputedStep, masks: Mapping[int, Mask]) -> StepResult:
        return step_result(handle, self.head, masks, self.config, self._ops)

    def head(self, hidden: Tensor) -> Tensor:
        """Some rows of hidden states -> logits [rows, vocab] in the weights' dtype."""
        assert self._plan is not None
        return self._plan.head(hidden)

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        assert self._cache is not None
        self._cache.copy(*torch.tensor([sources, destinations]))

    def warm_up(self, most_rows: int, longest: int) -> None:
        """Nothing waits for the first step."""


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Pages that the system hands out when they are first touched: a block that was never used takes no memory."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
