"""A scheduled batch through the model: tensors in, the few logits rows that somebody needs out."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lpa_model.attention import AttentionMetadata, Span
from lpa_model.cache import LatentCache
from lpa_model.model import LPAForCausalLM
from server.engine.grammar import GrammarCompiler, GrammarFailed, GrammarState
from server.engine.request import Logprobs, Request
from server.engine.sampler import sample, score
from server.engine.sampling_state import SamplingState
from server.engine.scheduler import ScheduledBatch, ScheduledRequest
from server.errors import InvalidRequest

Mask = npt.NDArray[np.uint8]  # a bit per token, lowest first

MIN_ROWS = 8  # a float32 product with fewer rows takes another path and rounds differently
LOGIT_ROWS = 256  # rows of logits held at once, in the head's dtype
MASK_GRACE = 0.002  # seconds that a step waits for a late grammar mask before it goes on without that request
MASK_THREADS = 2


@dataclass
class StepResult:
    """By request id: the sampled token, its log-probability, and log-probabilities of prompt tokens.

    `ended`: the grammar's text is complete, with this step's token or, if it has none, without another.
    `deferred`: the mask was not ready, so the last token is to be computed again and sampled then.
    `errors`: the grammar cannot be followed; the request has no token and must end.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, Logprobs] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    deferred: set[str] = field(default_factory=set)
    errors: dict[str, Exception] = field(default_factory=dict)


class ModelRunner:
    """Owns the model and its cache; everything it needs to know of a step is in the batch."""

    def __init__(
        self, model: LPAForCausalLM, cache: LatentCache, device: torch.device, compiler: GrammarCompiler
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.compiler = compiler
        self._mask_pool = ThreadPoolExecutor(MASK_THREADS, "grammar")
        # what a request needs from one token to the next lives as long as the request
        self._grammars: WeakKeyDictionary[Request, GrammarState] = WeakKeyDictionary()
        self._states: WeakKeyDictionary[Request, SamplingState] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Compute a step. The cache holds the batch's keys and values afterwards."""
        items = batch.items
        filled = {block for item in items for block in _filled_blocks(item, self.cache.block_size)}
        if partial := [block for block in batch.new_blocks if block not in filled]:
            self.cache.zero(torch.tensor(partial, device=self.device))
        self._start_masks(items)
        ids = [t for item in items for t in _input_ids(item)]
        padding = max(0, MIN_ROWS - len(ids))
        spans = [
            Span(
                item.request.num_computed_tokens,
                item.num_tokens,
                item.request.block_table,
                item.is_decode,
                item.request.branches,
            )
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
        if self.device.type == "cuda":  # a step that only fills the cache has waited for nothing yet
            torch.cuda.synchronize(self.device)  # whoever times it, to learn what prompts cost, is to see all of it
        return result

    def _head(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """[len(rows), vocab] in the head's dtype."""
        padded = rows + [rows[-1]] * (MIN_ROWS - len(rows))
        return self.model.head(hidden[padded])[: len(rows)]

    def _start_masks(self, items: list[ScheduledRequest]) -> None:
        """Compute what grammars allow beside the forward pass."""
        for item in items:
            if item.samples and (spec := item.request.params.grammar):
                if item.request not in self._grammars:
                    self._grammars[item.request] = GrammarState(self.compiler, spec)
                self._grammars[item.request].start(self._mask_pool)

    def _join_masks(self, items: list[ScheduledRequest], result: StepResult) -> dict[str, Mask]:
        """Masks of the requests that can be sampled now; the others are named in the result.

        A late mask costs the other requests no more than MASK_GRACE, unless more than half of the step is late.
        """
        constrained = [item.request for item in items if item.samples and item.request.params.grammar]
        if not constrained:
            return {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the forward pass has only been launched
        jobs = [self._grammars[request].start(self._mask_pool) for request in constrained]
        late = wait(jobs, timeout=MASK_GRACE).not_done
        while 2 * len(late) > len(items):
            late = wait(late, return_when=FIRST_COMPLETED).not_done
        masks = {}
        for request, job in zip(constrained, jobs, strict=True):
            if job in late:
                result.deferred.add(request.id)
                continue
            try:
                mask = self._grammars[request].take()
            except (GrammarFailed, InvalidRequest) as error:
                result.errors[request.id] = error
                continue
            if mask is None:
                result.ended.add(request.id)
            else:
                masks[request.id] = mask
        return masks

    def _sample(self, items: list[ScheduledRequest], hidden: Tensor, result: StepResult) -> None:
        masks = self._join_masks(items, result)
        sampling, rows, at = [], [], 0
        for item in items:
            at += item.num_tokens
            if item.samples and (item.request.params.grammar is None or item.request.id in masks):
                sampling.append(item.request)
                rows.append(at - 1)
        if not sampling:
            return
        logits = self._head(hidden, rows)
        tokens = sample(logits, [self._state(request).row(request, masks.get(request.id)) for request in sampling])
        result.tokens = {request.id: token for request, token in zip(sampling, tokens, strict=True)}
        self._score_tokens(sampling, logits, tokens, result)
        for request in sampling:
            if request.params.grammar:
                self._advance_grammar(request, result)

    def _advance_grammar(self, request: Request, result: StepResult) -> None:
        try:
            if self._grammars[request].advance(result.tokens[request.id]):
                result.ended.add(request.id)
        except GrammarFailed as error:
            result.errors[request.id] = error
            del result.tokens[request.id]

    def _state(self, request: Request) -> SamplingState:
        if request not in self._states:
            self._states[request] = SamplingState(request, self.model.config.eos_token_id)
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
            result.logprobs[sampling[i].id] = columns.part(n, n + 1, top)

    def _score_prompts(self, items: list[ScheduledRequest], hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens; all requests' rows meet the head together."""
        rows: list[int] = []
        targets: list[int] = []
        runs: list[tuple[Request, int, int, int]] = []  # a request, its first row and the one after its last, its top
        at = 0
        for item in items:
            request, start = item.request, at - item.request.num_computed_tokens
            at += item.num_tokens
            if scored := request.scored(request.num_computed_tokens, item.num_tokens):
                ids, first = request.token_ids, len(rows)
                rows += [start + token for token, _ in scored]
                targets += [ids[target] for _, target in scored]
                runs.append((request, first, len(rows), request.params.prompt_logprobs or 0))
        columns = Logprobs()
        for at in range(0, len(rows), LOGIT_ROWS):
            chunk = slice(at, at + LOGIT_ROWS)
            wanted = torch.tensor(targets[chunk], device=self.device)
            top = max(top for _, first, end, top in runs if first < at + LOGIT_ROWS and end > at)
            columns.extend(score(self._head(hidden, rows[chunk]), wanted, top))
        for request, first, end, top in runs:
            result.prompt_logprobs[request.id] = columns.part(first, end, top)


def _filled_blocks(item: ScheduledRequest, block_size: int) -> list[int]:
    """Blocks that the step writes from their first token to their last."""
    start = item.request.num_computed_tokens
    return item.request.block_table[-(-start // block_size) : (start + item.num_tokens) // block_size]


def _input_ids(item: ScheduledRequest) -> list[int]:
    start = item.request.num_computed_tokens
    return item.request.token_ids[start : start + item.num_tokens]
