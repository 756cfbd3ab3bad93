"""The torch backend: the model's own modules over a paged cache, on any device that torch knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lpa_model.backends import features
from lpa_model.backends.base import Mask, SamplingRow, StepResult
from lpa_model.backends.torch.attention import PagedAttention
from lpa_model.backends.torch.results import ComputedStep, step_result
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache, bytes_per_token
from lpa_model.config import CacheLayout
from lpa_model.model import LPAForCausalLM

MIN_ROWS = 8  # a float32 product with fewer rows takes another path and rounds differently


class TorchBackend:
    """`Backend` in plain torch."""

    batch_invariant = False
    runs_ahead = False

    def __init__(self, model: LPAForCausalLM, name: str, cache_dtype: torch.dtype) -> None:
        """`cache_dtype`: the model's, or int8."""
        weight = model.embed_tokens.weight
        self.model, self.config = model, model.config
        self.device, self.dtype = weight.device, weight.dtype
        self.name, self.cache_dtype = name, cache_dtype
        self.cache: LatentCache | None = None

    def cache_bytes_per_token(self, layout: CacheLayout) -> int:
        return bytes_per_token(self.config, layout, self.cache_dtype)

    def free_memory(self) -> int:
        return features.free_memory(self.device)

    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        allocate = partial(torch.zeros, device=self.device)
        self.cache = LatentCache(self.config, layout, num_blocks, block_size, self.cache_dtype, allocate)
        return self.cache

    @torch.inference_mode()
    def submit(self, batch: Batch, sampling: Sequence[SamplingRow]) -> ComputedStep:
        assert self.cache is not None
        if len(batch.zero_blocks):
            self.cache.zero(torch.from_numpy(batch.zero_blocks).to(self.device))
        padding = max(0, MIN_ROWS - batch.num_rows)
        attend = PagedAttention(batch, self.cache, self.model.rotary, padding=padding)
        ids = F.pad(torch.from_numpy(batch.ids), (0, padding)).to(self.device)
        inner: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> None:
            if (rows := batch.hidden.get(layer)) is not None:
                inner[layer] = stream[torch.from_numpy(rows).to(self.device)].float()

        return ComputedStep(batch, sampling, self.model(ids, attend.positions, attend, keep), inner)

    def wait(self, handle: ComputedStep) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def collect(self, handle: ComputedStep, masks: Mapping[int, Mask]) -> StepResult:
        result = step_result(handle, self.head, masks, self.config)
        self.wait(handle)  # a step that only fills the cache has waited for nothing yet
        return result

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        assert self.cache is not None
        self.cache.copy(*torch.tensor([sources, destinations], device=self.device))

    def warm_up(self, most_rows: int, longest: int) -> None:
        """Nothing waits for the first step."""

    def head(self, hidden: Tensor) -> Tensor:
        """[rows, d] -> logits [rows, vocab] in the head's dtype."""
        rows = len(hidden)
        return self.model.head(F.pad(hidden, (0, 0, 0, max(0, MIN_ROWS - rows))))[:rows]
