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
from lpa_model.backends.cuda.rows import StepBuffers, step_rows, take_carried
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
    head: sampling.Head  # reads memory that later steps, which may run before this one is collected, do not write
    hidden: Mapping[int, Fetch]
    scored: sampling.ScoredStep
    sampled: sampling.Sampled | None  # rows without a grammar; None: there are none
    computed: torch.cuda.Event | None  # when the forward pass is; None on a CPU


class CudaBackend:
    """`Backend` for one GPU. `ops` may be the twins, and the device a CPU: the same code without a GPU's speed."""

    runs_ahead = True

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
        self._drawn: Tensor | None = None  # [most rows, 2]: the last step's tokens, and whether their logits are broken
        self._late: torch.cuda.Stream | None = None  # on which rows are sampled while the next step runs

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
            self._drawn = torch.zeros(most_rows, 2, dtype=torch.float64, device=self.device)
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
            size, hidden = self._bucket(batch), dict[int, Fetch]()
            if size is None:
                head, hidden = self._launch(batch)
            else:
                self._buffers[size].fill(batch)
                self.graphs.replay(size)
                head = self._logits.__getitem__
            scored = sampling.score_prompt(head, batch, self.device)
            able = [i for i, row in enumerate(sampling_rows) if not row.constrained]
            sampled = None
            if size is not None and self._drawn_whole(batch, sampling_rows):
                sampled = self._replay_draw(size, sampling_rows)
            elif able:
                sampled = self._sample(head, sampling_rows, able, {})
                self._hand_on(sampled)
            if size is not None and any(row.constrained or _may_redraw(row) for row in sampling_rows):
                head = self._logits[: batch.num_rows].clone().__getitem__  # the next step overwrites them
            return Step(batch, sampling_rows, head, hidden, scored, sampled, self._event())

    def wait(self, handle: Step) -> None:
        if handle.computed is not None:
            handle.computed.synchronize()

    @torch.inference_mode()
    def collect(self, handle: Step, masks: Mapping[int, Mask]) -> StepResult:
        result = StepResult([None] * len(handle.rows))
        with self._on_device(), self._beside(handle):
            late = None
            if able := [i for i, row in enumerate(handle.rows) if row.constrained and i in masks]:
                late = self._sample(handle.head, handle.rows, able, masks)
            for sampled in (handle.sampled, late):
                if sampled is not None:
                    sampling.finish(sampled, handle.head, self.config.vocab_size, self.device, result)
            sampling.take_scores(handle.scored, result)
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
        assert self._weights is not None and self._cache is not None and self._drawn is not None
        buffers = self._buffers[size]
        take_carried(buffers.rows.ids, buffers.carried, self._drawn[:, 0])
        logits = self._logits[:size]
        logits.copy_(self.head(decode_step(self._weights, self._cache, buffers, self._ops)))
        best, _ = logit_ops.draw_greedy(logits)
        self._drawn[:size, 0].copy_(best)
        self._drawn[:size, 1].copy_(logit_ops.broken(logits))

    def _draw(self, size: int) -> None:
        """Tokens of so many rows by their settings, none of which has a top_k, over the best ones."""
        assert self._drawn is not None
        drawn = logit_ops.draw_tokens(self._logits[:size].float(), self._settings[:size], None)
        self._drawn[:size, 0].copy_(drawn)

    @staticmethod
    def _drawn_whole(batch: Batch, rows: Sequence[SamplingRow]) -> bool:
        """Whether graphs draw the tokens: of every row, from its logits as they are, without its log-probability."""
        if len(rows) != batch.num_rows:
            return False
        return not any(
            row.row != i
            or row.top_k
            or row.logprobs is not None
            or row.banned
            or row.allowed is not None
            or row.bias_ids is not None
            or row.seen is not None
            or row.constrained
            for i, row in enumerate(rows)
        )

    def _replay_draw(self, size: int, rows: Sequence[SamplingRow]) -> sampling.Sampled:
        assert self._drawn is not None
        n = len(rows)
        if any(row.temperature for row in rows):
            parcel = Parcel()
            parcel.add(np.array([settings_of(row, sampling.ATTEMPTS) for row in rows], np.float64))
            self._settings[:n].copy_(parcel.send(self.device)[0])
            self.draws.replay(size)
        tokens, columns = self._drawn[:n, 0], Fetch(self._drawn[:n].view(-1))
        return sampling.Sampled(range(n), rows, [None] * n, (), 0, tokens, columns, sampling.ATTEMPTS)

    def _launch(self, batch: Batch) -> tuple[sampling.Head, dict[int, Fetch]]:
        """Any step, operation by operation; and the hidden states that are wanted."""
        assert self._weights is not None and self._cache is not None
        parcel = Parcel()
        places = {layer: parcel.add(wanted) for layer, wanted in batch.hidden.items()}
        there = parcel.send(self.device)
        states: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> None:
            if layer in places:
                states[layer] = stream[there[places[layer]]].float()

        rows = step_rows(batch, self.device, None if self._drawn is None else self._drawn[:, 0])
        hidden = mixed_step(self._weights, self._cache, rows, self._ops, keep)
        keep(self.config.num_hidden_layers, hidden)
        fetched = {layer: Fetch(state) for layer, state in states.items()}
        return lambda chosen: self.head(hidden[chosen]), fetched

    def _sample(
        self, head: sampling.Head, rows: Sequence[SamplingRow], able: Sequence[int], masks: Mapping[int, Mask]
    ) -> sampling.Sampled:
        some, wanted = [rows[i] for i in able], [masks.get(i) for i in able]
        return sampling.sample(head, able, some, wanted, self.config.vocab_size, self.device)

    def _hand_on(self, sampled: sampling.Sampled) -> None:
        """Leave tokens where the next step finds them, each in the place of its sampling row."""
        if self._drawn is None:  # not warmed up
            return
        n = len(sampled.able)
        if sampled.able[-1] == n - 1:
            self._drawn[:n, 0].copy_(sampled.tokens)
            return
        parcel = Parcel()
        parcel.add(np.array(sampled.able, np.int64))
        self._drawn[:, 0].index_copy_(0, parcel.send(self.device)[0], sampled.tokens.double())

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _beside(self, handle: Step) -> contextlib.AbstractContextManager[object]:
        """What is launched now does not wait for steps that were submitted after this one."""
        if handle.computed is None:
            return contextlib.nullcontext()
        self._late = self._late or torch.cuda.Stream(self.device)
        self._late.wait_event(handle.computed)
        return torch.cuda.stream(self._late)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """What is launched without naming a device goes to this one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _may_redraw(row: SamplingRow) -> bool:
    """Whether the row may need more random numbers than it has at first."""
    return row.temperature > 0 and row.top_p < 1
