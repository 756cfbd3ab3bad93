"""Which requests run in the next step, and with how many tokens each. No tensors, no text.

Every request has `num_computed_tokens` that catches up with its tokens; there is no prefill or decode phase. In a
step generated tokens go first, one per request; prompt and scoring work then shares a budget: all of
`max_num_batched_tokens` when nothing streams, else what keeps the step within a small multiple of its decodes alone.

Smaller `priority` goes first, then groups round robin (`Turns`), then earlier arrival: into the step, out of the queue,
and last to lose its blocks. No group can hold all places while another has none.
Background requests (batch jobs) come last, lose slots and blocks to others, and get a few rows of a step beside
others' decodes (background.py).
A request whose next prefix block is being computed by a running one is set aside until it is there, and so are the
followers of a leader: they take its prompt over in the very step that completes it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engine.background import BackgroundShare
from server.engine.block_manager import BlockManager, hash_block, hash_root
from server.engine.request import BACKGROUND, FinishReason, Logprobs, Request, RequestStatus
from server.engine.step_cost import PromptBudget, PromptShare, StepCost, Work, work_of
from server.engine.waiting_queue import Turns, WaitingQueue, by_order, insert, remove

# Of the time of a step's decodes alone: a stream's median latency at most doubles while a corpus is scored, and its
# 99th percentile stays within three times its median while a long prompt arrives; the rest is margin for noise. Where
# more prompts wait than streams run, each of them counts as much as a stream, up to the step's budget.
SCORING_SHARE = 0.8
PROMPT_SHARE = 1.6


class ScheduledRequest(NamedTuple):
    """`num_tokens` tokens of a request from `num_computed_tokens` on; `is_decode` if it is its newest generated one.

    A follower has no tokens of its own: it samples from the row before it, the last of its leader's prompt.
    """

    request: Request
    num_tokens: int
    is_decode: bool

    @property
    def samples(self) -> bool:
        """Whether this step computes the request's last token and a new one is to be sampled."""
        request = self.request
        reached = request.num_computed_tokens + self.num_tokens == request.num_tokens
        return reached and request.params.max_tokens > 0


@dataclass
class ScheduledBatch:
    """One step: decodes first, then prompts, those of equal context and length side by side.

    `new_blocks` are to be cleared before use; `copies` are pairs (source, destination) of blocks to be copied once
    the step's keys and values are written.

    Once it is launched, `launched` has for each item the request's `num_computed_tokens` and whether a token is
    sampled; `void` names requests for which its results count no more.
    """

    items: list[ScheduledRequest] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: int = 0
    prefix_queries: int = 0  # tokens looked up by requests that start
    prefix_hits: int = 0
    samples: list[bool] = field(default_factory=list)  # of each item
    held: dict[str, int] = field(default_factory=dict)  # decodes that wait for their last token, by `held_by`
    launched: list[tuple[int, bool]] | None = None
    void: set[str] = field(default_factory=set)

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
        eos_token_ids: Collection[int],
        max_model_len: int,
        recompute_decodes_one_by_one: bool = True,
    ) -> None:
        """`recompute_decodes_one_by_one`: after a preemption, generated tokens are recomputed in decode steps, to the
        same bits; otherwise they are prefilled with the prompt."""
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.step_budget_ms = step_budget_ms
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self.recompute_decodes_one_by_one = recompute_decodes_one_by_one
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # sorted by order
        self.cost = StepCost()
        self.shares = {False: PromptShare(), True: PromptShare()}  # by is_scoring
        self.background = BackgroundShare()
        self._added = 0
        self._turns = Turns()
        self._computing: dict[bytes, Request] = {}  # prompt blocks being computed, and the request that fills them
        self._launched: ScheduledBatch | None = None  # the last one, which may be in flight

    def add(self, request: Request) -> None:
        """Queue a request, or set it aside if its leader's prompt is still to be computed."""
        self._added += 1
        request.order = (request.priority, self._turns.next(request.group), request.arrival, self._added)
        leader, request.leader = request.leader, None
        if leader is not None and request.can_follow(leader):
            self.waiting.set_aside(request, leader.followers, leader.num_prompt_tokens)
        else:
            self.waiting.add(request)

    def schedule(self) -> ScheduledBatch:
        """The next step's work; blocks for it are allocated, so it must be run or its requests finished."""
        batch = ScheduledBatch()
        background = bisect_left(self.running, (BACKGROUND,), key=by_order)  # where those begin
        of_others, of_background = self.running[:background], self.running[background:]
        for request in of_others:
            self._schedule_decode(request, batch)
        rows = self._background_rows(len(batch.items))
        for request in of_background:
            if rows and self._schedule_decode(request, batch):
                rows -= 1
        if self.waiting or len(batch.items) < len(self.running):
            self._schedule_prompts(batch, rows)
        batch.samples = [item.samples for item in batch.items]
        return batch

    def _schedule_decode(self, request: Request, batch: ScheduledBatch) -> bool:
        """Put a request's next token into the step if it is a generated one; whether it is there."""
        computed = request.num_computed_tokens
        if not self._decodes(request, computed):
            return False
        if request.num_pending and not self._goes_ahead(request, batch):
            return False
        full = computed == len(request.block_table) * self.blocks.block_size
        if (full or request.status is not RequestStatus.RUNNING) and not self._allocate_blocks(request, 1, batch):
            return False
        batch.items.append(ScheduledRequest(request, 1, True))
        return True

    def _goes_ahead(self, request: Request, batch: ScheduledBatch) -> bool:
        """Whether the token that is still being sampled can be computed, too: it is not the last one, and what comes
        after it does not depend on which one it is."""
        tokens = request.num_tokens
        if tokens - request.num_prompt_tokens >= request.params.max_tokens or tokens >= self.max_model_len:
            return False
        if request.held_by is not None:
            batch.held[request.held_by] = batch.held.get(request.held_by, 0) + 1
            return False
        return True

    def _background_rows(self, num_decodes: int) -> int:
        """The most rows of background work beside so many other decodes: any number where no other request runs or
        is ready."""
        best = (*self.running[:1], self.waiting.first((False, True)))
        if all(request is None or request.is_background for request in best):
            return self.max_num_batched_tokens
        return self.background.rows(num_decodes)

    def _decodes(self, request: Request, computed: int) -> bool:
        """Whether the token after `computed` ones is computed as a generated one, which goes alone."""
        tokens, prompt = request.num_tokens, request.num_prompt_tokens
        return tokens > prompt and computed >= (prompt if self.recompute_decodes_one_by_one else tokens - 1)

    def _prompt_end(self, request: Request) -> int:
        """Tokens up to here are computed as a prompt's."""
        return (
            request.num_prompt_tokens
            if self.recompute_decodes_one_by_one and request.num_generated
            else request.num_tokens_to_compute
        )

    def _schedule_prompts(self, batch: ScheduledBatch, rows: int) -> None:
        budget = self._prompt_budget(len(batch.items), sum(batch.held.values()))
        for request in list(self.running):
            if not budget.open_kinds:
                break
            running = request.status is RequestStatus.RUNNING  # still
            computed = request.num_computed_tokens
            if self._decodes(request, computed) or not running or request.is_scoring not in budget.open_kinds:
                continue
            if computed == request.num_tokens_to_compute:  # in flight
                continue
            end = self._prompt_end(request)
            if request.is_background:
                if not rows:
                    break
                end = min(end, computed + rows)
            tokens = budget.affordable(request, computed, end)
            if tokens and self._allocate_blocks(request, tokens, batch):
                self._take(request, tokens, budget, batch)
                rows -= tokens * request.is_background
        followers: dict[Request, list[Request]] = {}
        for item in batch.items:
            self._join(item, followers, batch)
        if not batch.preempted:
            self._admit_waiting(budget, followers, batch, rows)
        _arrange(batch, followers)

    def _admit_waiting(
        self, budget: PromptBudget, followers: dict[Request, list[Request]], batch: ScheduledBatch, rows: int
    ) -> None:
        size = self.blocks.block_size
        self._give_up_place(budget, followers, batch)
        while len(self.running) < self.max_num_seqs and (request := self.waiting.first(budget.open_kinds)):
            if request.is_background and not rows:
                break
            if request.num_pending and not self._goes_ahead(request, batch):
                break  # until its last token is known
            hits = self._hits(request)
            if (computer := self._computer(request, len(hits))) is not None:
                self.waiting.remove(request)
                self.waiting.set_aside(request, computer.waiters, _shared_tokens(request, computer, size))
                continue
            needed = -(-request.num_tokens_to_compute // size) - len(hits)
            if needed > self.blocks.num_available_besides(hits):
                if not request.is_background and (victim := self._background_victim(followers)) is not None:
                    self._give_way(victim, batch)
                    continue
                break  # first come, first served: a smaller one behind it does not overtake
            decodes = self._decodes(request, len(hits) * size)
            end = self._prompt_end(request)
            if request.is_background:
                end = min(end, len(hits) * size + rows)
            tokens = 1 if decodes else budget.affordable(request, len(hits) * size, end)
            if not tokens:
                continue
            self.waiting.remove(request)
            self._admit(request, hits, batch)
            self._allocate_blocks(request, tokens, batch)
            rows -= tokens * request.is_background
            if decodes:
                batch.items.append(ScheduledRequest(request, 1, True))
            else:
                self._take(request, tokens, budget, batch)
                self._join(batch.items[-1], followers, batch)

    def _give_up_place(
        self, budget: PromptBudget, followers: dict[Request, list[Request]], batch: ScheduledBatch
    ) -> None:
        """Where max_num_seqs run and the group whose turn it is has none, preempt one of the largest group, which is
        queued behind it. Background work loses its slots to any other."""
        first = self.waiting.first(budget.open_kinds)
        if first is None or len(self.running) < self.max_num_seqs or first.num_pending:
            return
        if not first.is_background and (background := self._background_victim(followers)) is not None:
            return self._give_way(background, batch)
        places = Counter(request.group for request in self.running)
        group, most = places.most_common(1)[0]
        if first.group in places or most < 2:
            return
        joined = {request for leader in followers for request in (leader, *followers[leader])}
        of_group = (r for r in reversed(self.running) if r.group == group and r not in joined)
        victim = next(of_group, None)
        if victim is None or victim.priority < first.priority:
            return
        hits = self._hits(first)
        needed = -(-first.num_tokens_to_compute // self.blocks.block_size) - len(hits)
        start = len(hits) * self.blocks.block_size
        if (
            needed > self.blocks.num_available_besides(hits)
            or self._computer(first, len(hits)) is not None
            or not (self._decodes(first, start) or budget.affordable(first, start, self._prompt_end(first)))
        ):
            return  # it could not run in this step
        self._give_way(victim, batch)
        self.waiting.remove(victim)
        turn = max(self._turns.next(group, again=True), first.order[1] + 1)
        victim.order = (victim.priority, turn, *victim.order[2:])
        self.waiting.add(victim)

    def _background_victim(self, followers: dict[Request, list[Request]]) -> Request | None:
        """The background request that goes last, if one runs and this step does not share its prompt."""
        last = self.running[-1] if self.running else None
        if last is None or not last.is_background or any(last in (lead, *joined) for lead, joined in followers.items()):
            return None
        return last

    def _give_way(self, victim: Request, batch: ScheduledBatch) -> None:
        self._preempt(victim)
        batch.preempted += 1
        batch.items = [item for item in batch.items if item.request is not victim]

    def _prompt_budget(self, num_decodes: int, num_held: int) -> PromptBudget:
        """`num_held`: decodes that wait for this step to be over, and so for its prompts."""
        tokens = max(1, self.max_num_batched_tokens - num_decodes)
        if not num_decodes + num_held:
            return PromptBudget(self.cost, tokens)
        if num_decodes and self.cost.probe_due(num_decodes):
            return PromptBudget(self.cost, 0)
        num_decodes += num_held
        decode_ms, pass_ms = self.cost.decode_ms(num_decodes), self.cost.pass_ms
        prompts = len(self.waiting.ready[False]) + sum(
            not (r.is_scoring or self._decodes(r, r.num_computed_tokens)) for r in self.running
        )
        prompt_share = PROMPT_SHARE * max(1.0, prompts / num_decodes)
        prompt_ms, scoring_ms = (
            self.shares[scoring].earn(share * decode_ms, pass_ms, self.step_budget_ms)
            for scoring, share in ((False, prompt_share), (True, SCORING_SHARE))
        )
        return PromptBudget(self.cost, tokens, prompt_ms, scoring_ms)

    def observe_step(self, batch: ScheduledBatch, elapsed_ms: float) -> None:
        """Learn from a step's time; to be called before `update`, which moves the requests on."""
        num_decodes, work = 0, Work()
        background_rows, background_decodes, other_prompts = 0, 0, False
        for request, num_tokens, is_decode in batch.items:
            if is_decode:
                num_decodes += 1
            elif num_tokens:
                more = work_of(request, request.num_computed_tokens, num_tokens)
                work = Work(*(a + b for a, b in zip(work, more, strict=True)))
            if request.is_background:
                background_rows += num_tokens
                background_decodes += is_decode
            elif not is_decode:
                other_prompts = True
        if num_decodes > background_decodes and not other_prompts:
            self.background.observe(num_decodes - background_decodes, background_rows, elapsed_ms)
        self.cost.observe(num_decodes, work._replace(passes=float(work.tokens > 0)), elapsed_ms)

    def _join(self, item: ScheduledRequest, followers: dict[Request, list[Request]], batch: ScheduledBatch) -> None:
        """Let the followers of a prompt that this step completes run: they share its full blocks and get a copy of
        the last one. Those that get no slot look the prompt up in the prefix cache as any request does."""
        leader = item.request
        if not leader.followers or leader.num_generated or not item.samples:
            return
        full, rest = divmod(leader.num_prompt_tokens, self.blocks.block_size)
        joined = followers[leader] = []
        for follower in sorted(leader.followers, key=by_order):
            if len(self.running) >= self.max_num_seqs or (rest and not self.blocks.num_available):
                break
            self.waiting.remove(follower)
            follower.block_table = leader.block_table[:full]
            self.blocks.take(follower.block_table)
            if rest:
                last = self.blocks.allocate(1)
                batch.copies.append((leader.block_table[full], last[0]))
                follower.block_table += last
            follower.num_computed_tokens = follower.num_prompt_tokens
            follower.num_cached_tokens = leader.num_cached_tokens
            self._run(follower)
            joined.append(follower)

    def _hits(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix of a request, as far as it may use it."""
        if not self.blocks.enable_prefix_caching:
            return []
        self._extend_hashes(request)
        return self.blocks.match(request.block_hashes[: request.max_cached_tokens // self.blocks.block_size])

    def _computer(self, request: Request, num_hits: int) -> Request | None:
        """The running request that is about to fill the block after a request's hits; not one of lower priority."""
        if num_hits >= request.max_cached_tokens // self.blocks.block_size:
            return None
        computer = self._computing.get(request.block_hashes[num_hits]) if request.block_hashes else None
        return computer if computer is not None and computer.priority <= request.priority else None

    def _take(self, request: Request, tokens: int, budget: PromptBudget, batch: ScheduledBatch) -> None:
        """Put the next prompt tokens of a request, for which it has blocks, into the step."""
        budget.spend(request, request.num_computed_tokens, tokens)
        for scoring in {False, request.is_scoring}:  # scoring takes of both
            self.shares[scoring].spend()
        batch.items.append(ScheduledRequest(request, tokens, False))

    def _admit(self, request: Request, hits: list[int], batch: ScheduledBatch) -> None:
        """Let a request run that has left the queue."""
        size = self.blocks.block_size
        self.blocks.take(hits)
        request.block_table = hits
        request.num_computed_tokens = len(hits) * size
        for digest in request.block_hashes[len(hits) : request.num_shareable_tokens // size]:
            self._computing.setdefault(digest, request)
        if not request.was_admitted:
            request.num_cached_tokens = request.num_computed_tokens
            if self.blocks.enable_prefix_caching:
                batch.prefix_queries += request.max_cached_tokens
                batch.prefix_hits += request.num_computed_tokens
        self._run(request)

    def _run(self, request: Request) -> None:
        self._turns.has_run(request.order[1])
        if request.admission is None:
            request.admission = time.monotonic()
        request.status = RequestStatus.RUNNING
        insert(self.running, request)

    def _allocate_blocks(self, request: Request, tokens: int, batch: ScheduledBatch) -> bool:
        """Give a request the blocks for its next tokens, preempting those that go last if there are none."""
        if request.status is not RequestStatus.RUNNING:
            return False
        needed = -(-(request.num_computed_tokens + tokens) // self.blocks.block_size) - len(request.block_table)
        if needed <= 0:
            return True
        while needed > self.blocks.num_available:
            victim = self.running[-1]
            self._give_way(victim, batch)
            if victim is request:
                return False
        fresh = self.blocks.allocate(needed)
        request.block_table += fresh
        batch.new_blocks += fresh
        return True

    def _preempt(self, request: Request) -> None:
        """Put a request back into the queue. Its full blocks stay cached until they are evicted."""
        if self.blocks.enable_prefix_caching:
            self._extend_hashes(request)
            size = self.blocks.block_size
            for i in range(request.num_shareable_tokens // size, request.num_computed_tokens // size):
                self.blocks.publish(request.block_table[i], request.block_hashes[i])
        self._stop_running(request)
        request.num_computed_tokens = 0
        if self._launched is not None and not request.num_pending:
            self._launched.void.add(request.id)  # where it is in flight, its prompt is computed anew
        if not request.num_generated:  # its prompt will be scored anew
            request.prompt_logprobs = Logprobs()
            if request.hidden is not None:
                request.hidden.clear()
        request.status = RequestStatus.WAITING
        self.waiting.add(request)

    def _stop_running(self, request: Request) -> None:
        """Free a request's blocks and its slot; requests that waited for its blocks stop waiting."""
        remove(self.running, request)
        size = self.blocks.block_size
        for digest in request.block_hashes[request.num_computed_tokens // size : request.num_shareable_tokens // size]:
            if self._computing.get(digest) is request:
                del self._computing[digest]
        self.waiting.wake(request.waiters)
        self.blocks.release(request.block_table)
        request.block_table = []

    def launch(self, batch: ScheduledBatch) -> None:
        """Account for a step that was submitted, before its results are there: the next one can be scheduled.

        Its blocks can be found at once, since later steps run after it.
        """
        batch.launched = []
        for (request, num_tokens, is_decode), samples in zip(batch.items, batch.samples, strict=True):
            self._move_on(request, num_tokens, is_decode)
            request.num_pending += samples
            batch.launched.append((request.num_computed_tokens, samples))
            if samples and request.followers:  # they got no slot
                self.waiting.wake(request.followers)
        self._launched = batch

    def _move_on(self, request: Request, computed: int, is_decode: bool) -> None:
        request.num_computed_tokens += computed
        if not is_decode:
            self._publish(request, computed)

    def recompute(self, request: Request) -> None:
        """The token that has just come is another one than the step in flight has taken it for: that step's result for
        the request counts no more."""
        if request.num_pending and self._launched is not None:
            request.num_pending = 0
            request.num_computed_tokens -= 1
            self._launched.void.add(request.id)

    def give_up(self, batch: ScheduledBatch) -> None:
        """A launched step has no results, and what it and the one before have written may be wrong: its requests are
        computed anew, and no cached block is used again."""
        for item in batch.items:
            request = item.request
            if request.status is not RequestStatus.FINISHED:
                request.num_pending = 0
            if request.status is RequestStatus.RUNNING:
                self._preempt(request)
        self.blocks.forget()

    def update(
        self,
        batch: ScheduledBatch,
        tokens: dict[str, int],
        *,
        ended: Container[str] = (),
        deferred: Container[str] = (),
    ) -> Iterator[tuple[Request, int | None]]:
        """Account for a step that ran; yields each of its requests with the token it sampled, if any.

        `tokens` has a token id for every scheduled request that samples, but for those that have finished
        meanwhile, are `deferred` (their last token counts as not computed, so that they sample in the next step) or
        have `ended` without one (their grammar is complete). The blocks of finished requests are free when
        they are yielded.
        """
        for i, (request, num_tokens, is_decode) in enumerate(batch.items):
            if request.status is RequestStatus.FINISHED or request.id in batch.void:
                continue
            if batch.launched is None:
                self._move_on(request, num_tokens - (request.id in deferred), is_decode)
                end = request.num_computed_tokens
            else:
                end, samples = batch.launched[i]
                request.num_pending -= samples
                if request.id in deferred and request.status is RequestStatus.RUNNING:  # not preempted since
                    request.num_computed_tokens -= 1
            token = tokens.get(request.id)
            if token is not None:
                request.token_ids.append(token)
            if request.id in ended:
                self.finish(request, FinishReason.STOP)
            elif token is not None:
                self._check_stop(request, token)
                if request.followers:  # they got no slot
                    self.waiting.wake(request.followers)
            elif request.is_scoring and end == request.num_tokens_to_compute:
                self.finish(request, FinishReason.LENGTH)
            yield request, token

    def _check_stop(self, request: Request, token: int) -> None:
        params, generated = request.params, request.num_output_tokens
        if generated >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return self.finish(request, FinishReason.STOP)
            if token in params.stop_token_ids:
                return self.finish(request, FinishReason.STOP, token)
        if generated >= params.max_tokens or len(request.token_ids) >= self.max_model_len:
            self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request, wherever it is; its blocks are free at once. Ending it again does nothing."""
        if request.status is RequestStatus.FINISHED:
            return
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        self.waiting.wake(request.followers)
        self._turns.leave(request.group)
        request.status, request.num_pending = RequestStatus.FINISHED, 0
        request.finish_reason, request.stop_reason = reason, stop_reason

    def _extend_hashes(self, request: Request) -> None:
        """Digests of all full blocks; a block that holds generated tokens is private to its request."""
        size, hashes = self.blocks.block_size, request.block_hashes
        for start in range(len(hashes) * size, len(request.token_ids) - size + 1, size):
            end = start + size
            salt = request.order[-1].to_bytes(8, "little") if end > request.num_shareable_tokens else b""
            parent = hashes[-1] if hashes else hash_root(request.cache_salt)
            hashes.append(hash_block(parent, request.token_ids[start:end], salt))

    def _publish(self, request: Request, num_new_tokens: int) -> None:
        """Make the prompt blocks that the last `num_new_tokens` tokens filled findable. Those of generated tokens
        need not be: only a preemption makes their own request look for them."""
        if not self.blocks.enable_prefix_caching:
            return
        self._extend_hashes(request)  # a follower that was deferred has none
        size, computed = self.blocks.block_size, request.num_computed_tokens
        for i in range((computed - num_new_tokens) // size, min(computed, request.num_shareable_tokens) // size):
            digest = request.block_hashes[i]
            self.blocks.publish(request.block_table[i], digest)
            if self._computing.get(digest) is request:
                del self._computing[digest]
        if request.waiters:
            self.waiting.wake(request.waiters, computed)


def _shared_tokens(request: Request, computer: Request, block_size: int) -> int:
    """Length of the prefix, in whole blocks, that a request can take from the one that is computing it."""
    usable = request.max_cached_tokens // block_size
    blocks = 0
    for mine, its in zip(request.block_hashes[:usable], computer.block_hashes, strict=False):
        if mine != its:
            break
        blocks += 1
    return blocks * block_size


def _arrange(batch: ScheduledBatch, followers: dict[Request, list[Request]]) -> None:
    """Prompts of equal shape are adjacent, since attention batches them; followers are after their leader."""
    shapes: dict[tuple[int, int], list[ScheduledRequest]] = {}  # by (context, length), in order of appearance
    decodes = []
    for item in batch.items:
        if item.is_decode:
            decodes.append(item)
        else:
            same = shapes.setdefault((item.request.num_computed_tokens, item.num_tokens), [])
            same.append(item)
            same += [ScheduledRequest(follower, 0, False) for follower in followers.get(item.request, ())]
    batch.items = decodes + [item for same in shapes.values() for item in same]
