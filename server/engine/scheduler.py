"""Which requests run in the next step, and with how many tokens each. No tensors, no text.

Every request has `num_computed_tokens` that catches up with its tokens; there is no prefill or decode phase. In a
step generated tokens go first, one per request; prompt and scoring work then shares a token budget: all of
`max_num_batched_tokens` when nothing streams, else what fits `step_budget_ms` by a running estimate of its cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.block_manager import BlockManager, hash_block
from server.engine.request import FinishReason, Logprobs, Request, RequestStatus


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` tokens of a request from `num_computed_tokens` on; `is_decode` if it is its newest generated one."""

    request: Request
    num_tokens: int
    is_decode: bool

    @property
    def samples(self) -> bool:
        """Whether this step computes the request's last token and a new one is to be sampled."""
        request = self.request
        reached = request.num_computed_tokens + self.num_tokens == len(request.token_ids)
        return reached and request.params.max_tokens > 0


@dataclass
class ScheduledBatch:
    """One step: decodes first, then prompts; `new_blocks` are to be cleared before use."""

    items: list[ScheduledRequest] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    preempted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items if not item.is_decode)


class Scheduler:
    """The waiting queue, the running requests and the budget."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_budget_ms: float,
        eos_token_id: int | None,
        max_model_len: int,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.step_budget_ms = step_budget_ms
        self.eos_token_id = eos_token_id
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.prompt_token_ms: float | None = None  # running estimate of a prompt token's cost

    def add(self, request: Request) -> None:
        """Append a request to the waiting queue."""
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch:
        """The next step's work; blocks for it are allocated, so it must be run or its requests finished."""
        batch = ScheduledBatch()
        for request in list(self.running):
            if request.is_decode and self._make_room(request, 1, batch):
                batch.items.append(ScheduledRequest(request, 1, is_decode=True))
        # a later request may have lost its blocks to an earlier one that was scheduled after it
        batch.items = [item for item in batch.items if item.request.status is RequestStatus.RUNNING]
        budget = self._prompt_budget(streaming=bool(batch.items))
        for request in list(self.running):
            if budget and request.status is RequestStatus.RUNNING and not request.is_decode:
                budget -= self._schedule_prompt(request, budget, batch)
        while self.waiting and len(self.running) < self.max_num_seqs and budget and not batch.preempted:
            if not self._admit(self.waiting[0], batch):
                break
            request = self.waiting.popleft()
            budget -= self._schedule_prompt(request, budget, batch)
        return batch

    def _prompt_budget(self, streaming: bool) -> int:
        if not streaming or self.prompt_token_ms is None:
            return self.max_num_batched_tokens
        affordable = int(self.step_budget_ms / self.prompt_token_ms)
        return max(1, min(affordable, self.max_num_batched_tokens))

    def observe_step(self, batch: ScheduledBatch, elapsed_ms: float) -> None:
        """Learn what a prompt token costs from a step that held enough of them to tell."""
        tokens = batch.num_prompt_tokens
        if tokens >= 16:
            cost = elapsed_ms / batch.num_tokens
            self.prompt_token_ms = cost if self.prompt_token_ms is None else 0.8 * self.prompt_token_ms + 0.2 * cost

    def _schedule_prompt(self, request: Request, budget: int, batch: ScheduledBatch) -> int:
        tokens = min(budget, request.num_tokens_to_compute - request.num_computed_tokens)
        if not self._make_room(request, tokens, batch):
            return 0
        batch.items.append(ScheduledRequest(request, tokens, is_decode=False))
        return tokens

    def _admit(self, request: Request, batch: ScheduledBatch) -> bool:
        """Move a request from the queue to the running ones if its whole prompt fits now, prefix hits included."""
        size = self.blocks.block_size
        self._extend_hashes(request)
        hits = self.blocks.match(request.block_hashes[: request.max_cached_tokens // size])
        needed = -(-request.num_tokens_to_compute // size) - len(hits)
        if needed > self.blocks.num_available_besides(hits):
            return False
        self.blocks.take(hits)
        request.block_table = hits
        request.num_computed_tokens = len(hits) * size
        if not request.num_output_tokens:
            request.num_cached_tokens = request.num_computed_tokens
        if self.blocks.enable_prefix_caching:
            batch.prefix_queries += request.max_cached_tokens
            batch.prefix_hits += request.num_computed_tokens
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self.running.sort(key=lambda r: r.arrival)
        return True

    def _make_room(self, request: Request, tokens: int, batch: ScheduledBatch) -> bool:
        """Give a request the blocks for its next tokens, preempting those that arrived last if there are none."""
        if request.status is not RequestStatus.RUNNING:
            return False
        size = self.blocks.block_size
        needed = -(-(request.num_computed_tokens + tokens) // size) - len(request.block_table)
        while needed > self.blocks.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            batch.preempted += 1
            batch.items = [item for item in batch.items if item.request is not victim]
            if victim is request:
                return False
        if needed > 0:
            fresh = self.blocks.allocate(needed)
            request.block_table += fresh
            batch.new_blocks += fresh
        return True

    def _preempt(self, request: Request) -> None:
        """Put a request back to the head of the queue. Its full blocks stay cached until somebody needs them."""
        self.running.remove(request)
        self.blocks.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0
        if not request.num_output_tokens:  # its prompt will be scored anew
            request.prompt_logprobs = Logprobs()
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def update(self, batch: ScheduledBatch, tokens: dict[str, int]) -> Iterator[tuple[Request, int | None]]:
        """Account for a step that ran; yields each of its requests with the token it sampled, if any.

        `tokens` has a token id for every scheduled request that samples. Finished requests have given their
        blocks back when they are yielded.
        """
        for item in batch.items:
            request = item.request
            request.num_computed_tokens += item.num_tokens
            self._publish(request, item.num_tokens)
            token = tokens.get(request.id)
            if token is not None:
                request.token_ids.append(token)
                self._check_stop(request, token)
            elif request.num_computed_tokens == request.num_tokens_to_compute:
                self.finish(request, FinishReason.LENGTH)
            yield request, token

    def _check_stop(self, request: Request, token: int) -> None:
        params = request.params
        if request.num_output_tokens >= params.min_tokens:
            if token == self.eos_token_id and not params.ignore_eos:
                return self.finish(request, FinishReason.STOP)
            if token in params.stop_token_ids:
                return self.finish(request, FinishReason.STOP, token)
        if request.num_output_tokens >= params.max_tokens or len(request.token_ids) >= self.max_model_len:
            self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request, wherever it is; its blocks are free at once. Ending it again does nothing."""
        if request.status is RequestStatus.FINISHED:
            return
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        self.blocks.release(request.block_table)
        request.block_table = []
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason

    def _extend_hashes(self, request: Request) -> None:
        """Digests of all full blocks; a block that holds generated tokens is private to its request."""
        size = self.blocks.block_size
        for start in range(len(request.block_hashes) * size, len(request.token_ids) - size + 1, size):
            end = start + size
            salt = request.id.encode()[:64] if end > request.num_prompt_tokens else b""
            parent = request.block_hashes[-1] if request.block_hashes else b""
            request.block_hashes.append(hash_block(parent, request.token_ids[start:end], salt))

    def _publish(self, request: Request, num_new_tokens: int) -> None:
        """Make the blocks that the last `num_new_tokens` tokens filled findable."""
        if not self.blocks.enable_prefix_caching:
            return
        self._extend_hashes(request)
        size = self.blocks.block_size
        first = (request.num_computed_tokens - num_new_tokens) // size
        for i in range(first, request.num_computed_tokens // size):
            self.blocks.publish(request.block_table[i], request.block_hashes[i])
