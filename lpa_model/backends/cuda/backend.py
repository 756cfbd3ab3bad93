"""The CUDA backend: steps of generated tokens are replayed, others launched, and their tokens come back in one copy."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lpa_model.backends import features
from lpa_model.backends.base import Mask, SamplingRow, StepResult
from lpa_model.backends.cuda import logits as logit_ops
from lpa_model.backends.cuda import sampling
from lpa_model.backends.cuda.graphs import Graphs, buckets, capture
from lpa_model.backends.cuda.ops import Ops
from lpa_model.backends.cuda.rows import StepBuffers, step_rows
from lpa_model.backends.cuda.step import decode_step, head, mixed_step
from lpa_model.backends.cuda.transfer import Fetch, Parcel
from lpa_model.backends.cuda.weights import UNIT, Weights
from lpa_model.backends.torch.sampling import settings_of
from lpa_model.batch import Batch
from lpa_model.cache import LatentCache, bytes_per_token
from lpa_model.config import CacheLayout
from lpa_model.model import LPAForCausalLM

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """A handle: what is on its way of a submitted step."""

    batch: Batch
    rows: Sequence[SamplingRow]
    head: sampling.Head
    hidden: Mapping[int, Fetch]
    computed: torch.cuda.Event | None  # when the forward pass is; None on a CPU
    sampled: sampling.Sampled | None  # None: grammar masks are still to come, or prompts are scored beside it


class CudaBackend:
    """`Backend` for one GPU. `ops` may be the twins, and the device a CPU: the same code without a GPU's speed."""

    def __init__(self, model: LPAForCausalLM, name: str, ops: Ops, batch_invariant: bool) -> None:
        """`batch_invariant`: what `ops` are."""
        self.config, self.name, self.batch_invariant = model.config, name, batch_invariant
        weight = model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs, self.draws = Graphs(), Graphs()
        self._model: LPAForCausalLM | None = model  # until its weights are joined
        self._ops = ops
        self._weights: Weights | None = None
        self._cache: LatentCache | None = None
        self._buffers: dict[int, StepBuffers] = {}
        self._longest = 0  # tokens of a sequence that graphs take

    def cache_bytes_per_token(self, layout: CacheLayout) -> int:
        return bytes_per_token(self.config, layout, self.dtype, UNIT)

    def free_memory(self) -> int:
        return features.free_memory(self.device)

    @torch.inference_mode()
    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        """The pools; and weights are joined, since that depends on the layout."""
        assert self._model is not None, "the cache is made once"
        allocate = partial(torch.zeros, device=self.device)
        self._cache = LatentCache(self.config, layout, num_blocks, block_size, self.dtype, allocate, UNIT)
        self._weights = Weights(self._model, self._cache.forms)
        self._model = None
        return self._cache

    @torch.inference_mode()
    def warm_up(self, most_rows: int, longest: int) -> None:
        """Compile kernels and capture steps of up to `most_rows` sequences of up to `longest` tokens."""
        assert self._cache is not None and self._weights is not None
        with self._on_device():
            vocab, self._longest = self.config.vocab_size, longest
            self._logits = torch.empty(most_rows, vocab, dtype=self.dtype, device=self.device)
            self._drawn = torch.empty(most_rows, 2, dtype=torch.float64, device=self.device)
            self._settings = torch.zeros(most_rows, 4 + sampling.ATTEMPTS, dtype=torch.float64, device=self.device)
            blocks = -(-longest // self._cache.block_size)
            runs: dict[int, Sequence[Callable[[], None]]] = {}
            for size in buckets(most_rows):
                self._buffers[size] = StepBuffers(size, blocks, self.device)
                runs[size] = partial(self._decode, size), partial(self._draw, size)
            self.graphs, self.draws = capture(runs, self.device)
        for reason, sizes in itertools.groupby(sorted(self.graphs.left_out), self.graphs.left_out.__getitem__):
            logger.warning("steps of %s rows are not captured: %s", ", ".join(map(str, sizes)), reason)
        logger.info(
            "steps of %s rows are captured: %.1f s, %.0f MiB",
            ", ".join(map(str, sorted(self.graphs.replays))) or "no",
            self.graphs.seconds,
            self.graphs.bytes / 2**20,
        )

    @torch.inference_mode()
    def submit(self, batch: Batch, sampling_rows: Sequence[SamplingRow]) -> Step:
        # Newly allocated blocks are not cleared: no kernel reads behind the end of a sequence.
        with self._on_device():
            size = self._bucket(batch)
            if size is None:
                step = self._launch(batch, sampling_rows)
            else:
                self._buffers[size].fill(batch)
                self.graphs.replay(size)
                step = Step(batch, sampling_rows, self._logits.__getitem__, {}, self._event(), None)
            if sampling_rows and not len(batch.scored.rows) and not any(row.constrained for row in sampling_rows):
                every = range(len(sampling_rows))
                if size is not None and self._drawn_whole(batch, sampling_rows):
                    step.sampled = self._replay_draw(size, sampling_rows)
                else:
                    step.sampled = self._sample(step, every, {})
            return step

    def wait(self, handle: Step) -> None:
        if handle.computed is not None:
            handle.computed.synchronize()

    @torch.inference_mode()
    def collect(self, handle: Step, masks: Mapping[int, Mask]) -> StepResult:
        result = StepResult([None] * len(handle.rows))
        with self._on_device():
            scored = sampling.score_prompt(handle.head, handle.batch, self.device)
            sampled = handle.sampled
            if sampled is None:
                able = [i for i, row in enumerate(handle.rows) if not row.constrained or i in masks]
                sampled = self._sample(handle, able, masks) if able else None
            if sampled is not None:
                sampling.finish(sampled, handle.head, self.config.vocab_size, self.device, result)
            sampling.take_scores(scored, result)
            for layer, states in handle.hidden.items():
                result.hidden[layer] = states.result()
            self.wait(handle)  # a step that only fills the cache has waited for nothing yet
        return result

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        assert self._cache is not None
        parcel = Parcel()
        parcel.add(np.array([sources, destinations], np.int64))
        with self._on_device():
            self._cache.copy(*parcel.send(self.device)[0])

    def head(self, hidden: Tensor) -> Tensor:
        """Some rows of hidden states -> logits [rows, vocab] in the weights' dtype."""
        assert self._weights is not None
        return head(self._weights, hidden.to(self.dtype), self._ops)

    def _bucket(self, batch: Batch) -> int | None:
        """The graph that replays the batch; None if none does."""
        if batch.num_rows > batch.num_decode or batch.hidden:
            return None
        if batch.num_rows == 0 or int(batch.positions.max()) >= self._longest:
            return None
        return self.graphs.bucket(batch.num_rows)

    def _decode(self, size: int) -> None:
        """Of so many rows in their buffers: logits, the best tokens, and whether the logits are finite."""
        assert self._weights is not None and self._cache is not None
        logits = self._logits[:size]
        logits.copy_(self.head(decode_step(self._weights, self._cache, self._buffers[size], self._ops)))
        best, _ = logit_ops.draw_greedy(logits)
        self._drawn[:size, 0].copy_(best)
        self._drawn[:size, 1].copy_(logit_ops.broken(logits))

    def _draw(self, size: int) -> None:
        """Tokens of so many rows by their settings, none of which has a top_k, over the best ones."""
        drawn = logit_ops.draw_tokens(self._logits[:size].float(), self._settings[:size], None)
        self._drawn[:size, 0].copy_(drawn)

    @staticmethod
    def _drawn_whole(batch: Batch, rows: Sequence[SamplingRow]) -> bool:
        """Whether graphs draw the tokens: of every row, from its logits as they are, without its log-probability."""
        return [row.row for row in rows] == list(range(batch.num_rows)) and all(
            sampling.is_plain(row) and not row.top_k and row.logprobs is None for row in rows
        )

    def _replay_draw(self, size: int, rows: Sequence[SamplingRow]) -> sampling.Sampled:
        n = len(rows)
        if any(row.temperature for row in rows):
            parcel = Parcel()
            parcel.add(np.array([settings_of(row, sampling.ATTEMPTS) for row in rows], np.float64))
            self._settings[:n].copy_(parcel.send(self.device)[0])
            self.draws.replay(size)
        columns = Fetch(self._drawn[:n].view(-1))
        return sampling.Sampled(range(n), rows, [None] * n, (), 0, columns, sampling.ATTEMPTS)

    def _launch(self, batch: Batch, rows: Sequence[SamplingRow]) -> Step:
        """Any step, operation by operation."""
        assert self._weights is not None and self._cache is not None
        parcel = Parcel()
        places = {layer: parcel.add(wanted) for layer, wanted in batch.hidden.items()}
        there = parcel.send(self.device)
        states: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> None:
            if layer in places:
                states[layer] = stream[there[places[layer]]].float()

        hidden = mixed_step(self._weights, self._cache, step_rows(batch, self.device), self._ops, keep)
        keep(self.config.num_hidden_layers, hidden)
        fetched = {layer: Fetch(state) for layer, state in states.items()}
        return Step(batch, rows, lambda chosen: self.head(hidden[chosen]), fetched, self._event(), None)

    def _sample(self, step: Step, able: Sequence[int], masks: Mapping[int, Mask]) -> sampling.Sampled:
        rows, wanted = [step.rows[i] for i in able], [masks.get(i) for i in able]
        return sampling.sample(step.head, able, rows, wanted, self.config.vocab_size, self.device)

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """What is launched without naming a device goes to this one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
