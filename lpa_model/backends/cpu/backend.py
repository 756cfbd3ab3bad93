"""The CPU backend: steps as op lists over packed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lpa_model.backends import features
from lpa_model.backends.base import Mask, SamplingRow, StepResult
from lpa_model.backends.cpu.kernels.launch import Kernel
from lpa_model.backends.cpu.logits import kernel_rows
from lpa_model.backends.cpu.plan import FusedStep
from lpa_model.backends.torch.results import ComputedStep, step_result
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache, bytes_per_token
from lpa_model.config import CacheLayout
from lpa_model.model import LPAForCausalLM


class CpuBackend:
    """`Backend` whose steps are op lists; a row's bits depend on the row alone."""

    batch_invariant = True

    def __init__(self, model: LPAForCausalLM, kernel: Kernel, instruction_set: str) -> None:
        self.config, self.dtype = model.config, model.embed_tokens.weight.dtype
        self.name = f"cpu ({instruction_set}, {str(self.dtype).removeprefix('torch.')})"
        self.ops = kernel_rows(self.dtype)
        self.kernel = kernel
        self.model: LPAForCausalLM | None = model  # until its weights are packed
        self.step: FusedStep | None = None
        self.cache: LatentCache | None = None

    def cache_bytes_per_token(self, layout: CacheLayout) -> int:
        return bytes_per_token(self.config, layout, self.dtype)

    def free_memory(self) -> int:
        return features.free_memory(torch.device("cpu"))

    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        assert self.model is not None, "the cache is made once"
        self.cache = LatentCache(self.config, layout, num_blocks, block_size, self.dtype, torch.device("cpu"))
        self.step = FusedStep(self.model, self.cache, self.kernel)
        self.model = None
        return self.cache

    @torch.inference_mode()
    def submit(self, batch: Batch, sampling: Sequence[SamplingRow]) -> ComputedStep:
        assert self.cache is not None and self.step is not None
        if len(batch.zero_blocks):
            self.cache.zero(torch.from_numpy(batch.zero_blocks))
        return ComputedStep(batch, sampling, self.step(batch))

    def wait(self, handle: ComputedStep) -> None:
        """`submit` has computed it."""

    @torch.inference_mode()
    def collect(self, handle: ComputedStep, masks: Mapping[int, Mask]) -> StepResult:
        return step_result(handle, self.head, masks, self.ops)

    def head(self, hidden: Tensor) -> Tensor:
        """[rows, d] -> logits [rows, vocab] in the weights' dtype."""
        assert self.step is not None
        return self.step.head(hidden)

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        assert self.cache is not None
        self.cache.copy(*torch.tensor([sources, destinations]))

    def warm_up(self) -> None:
        """Weights are packed when the cache is made."""
