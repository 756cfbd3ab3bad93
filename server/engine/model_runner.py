"""A scheduled batch through the model: tensors in, the few logits rows that somebody needs out."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lpa_model.attention import AttentionMetadata, Span
from lpa_model.cache import LatentCache
from lpa_model.model import LPAForCausalLM
from server.engine.request import Logprobs, Request
from server.engine.sampler import sample, score
from server.engine.sampling_state import SamplingState
from server.engine.scheduler import ScheduledBatch, ScheduledRequest

MIN_ROWS = 8  # a float32 product with fewer rows takes another path and rounds differently
LOGIT_ROWS = 256  # rows of logits held at once


@dataclass
class StepResult:
    """By request id: the sampled token, its log-probability, and log-probabilities of prompt tokens."""

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, Logprobs] = field(default_factory=dict)


class ModelRunner:
    """Owns the model and its cache; everything it needs to know of a step is in the batch."""

    def __init__(self, model: LPAForCausalLM, cache: LatentCache, device: torch.device, eos_token_id: int | None):
        self.model = model
        self.cache = cache
        self.device = device
        self.eos_token_id = eos_token_id
        self._states: WeakKeyDictionary[Request, SamplingState] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Compute a step. The cache holds the batch's keys and values afterwards."""
        if batch.new_blocks:
            self.cache.zero(torch.tensor(batch.new_blocks, device=self.device))
        items = batch.items
        ids = [t for item in items for t in _input_ids(item)]
        padding = max(0, MIN_ROWS - len(ids))
        spans = [
            Span(item.request.num_computed_tokens, item.num_tokens, item.request.block_table, item.is_decode)
            for item in items
            if item.num_tokens  # a follower samples from its leader's last row
        ]
        meta = AttentionMetadata.build(spans, self.cache.block_size, self.device, padding)
        hidden = self.model(torch.tensor(ids + [0] * padding, device=self.device), meta, self.cache)
        if batch.copies:
            self.cache.copy(*torch.tensor(batch.copies, device=self.device).unbind(1))
        result = StepResult()
        self._sample(items, hidden, result)
        self._score_prompts(items, hidden, result)
        return result

    def _logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        padded = rows + [rows[-1]] * (MIN_ROWS - len(rows))
        return self.model.logits(hidden[padded])[: len(rows)]

    def _sample(self, items: list[ScheduledRequest], hidden: Tensor, result: StepResult) -> None:
        sampling, rows, at = [], [], 0
        for item in items:
            at += item.num_tokens
            if item.samples:
                sampling.append(item.request)
                rows.append(at - 1)
        if not sampling:
            return
        logits = self._logits(hidden, rows)
        tokens = sample(logits, [self._state(request).row(request) for request in sampling])
        result.tokens = {request.id: token for request, token in zip(sampling, tokens, strict=True)}
        self._score_tokens(sampling, logits, tokens, result)

    def _state(self, request: Request) -> SamplingState:
        if request not in self._states:
            self._states[request] = SamplingState(request, self.eos_token_id)
        return self._states[request]

    def _score_tokens(self, sampling: list[Request], logits: Tensor, tokens: list[int], result: StepResult) -> None:
        """Log-probabilities of the sampled tokens, all rows that want them in one go."""
        scored = [(i, top) for i, request in enumerate(sampling) if (top := request.params.logprobs) is not None]
        if not scored:
            return
        rows = [i for i, _ in scored]
        targets = torch.tensor([tokens[i] for i in rows], device=logits.device)
        columns = score(logits if len(rows) == len(logits) else logits[rows], targets, max(top for _, top in scored))
        for n, (i, top) in enumerate(scored):
            result.logprobs[sampling[i].id] = Logprobs(
                columns.logprobs[n : n + 1],
                columns.ranks[n : n + 1],
                [columns.top_ids[n][:top]],
                [columns.top_logprobs[n][:top]],
            )

    def _score_prompts(self, items: list[ScheduledRequest], hidden: Tensor, result: StepResult) -> None:
        """Row i of a prompt gives the log-probability of token i + 1."""
        at = 0
        for item in items:
            request, start = item.request, at
            at += item.num_tokens
            top = request.params.prompt_logprobs
            if top is None or request.num_output_tokens:
                continue
            computed = request.num_computed_tokens
            first = max(computed, request.params.first_logit_position)
            last = min(computed + item.num_tokens, request.num_prompt_tokens - 1)
            for chunk in range(first, last, LOGIT_ROWS):
                end = min(last, chunk + LOGIT_ROWS)
                logits = self._logits(hidden, list(range(start + chunk - computed, start + end - computed)))
                targets = torch.tensor(request.token_ids[chunk + 1 : end + 1], device=self.device)
                result.prompt_logprobs.setdefault(request.id, Logprobs()).extend(score(logits, targets, top))


def _input_ids(item: ScheduledRequest) -> list[int]:
    start = item.request.num_computed_tokens
    return item.request.token_ids[start : start + item.num_tokens]
