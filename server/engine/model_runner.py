"""A scheduled batch through a backend: requests as arrays in, results by request out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from lpa_model.backends.base import Backend, Floats, Handle, Mask, SamplingRow, StepResult
from lpa_model.batch import NOT_MEASURED, Batch, Ints, Measured, ScoredRows, Span
from lpa_model.cache import LatentCache
from server.engine.grammar import GrammarCompiler, GrammarState, failure_of
from server.engine.request import Logprobs, Request
from server.engine.sampling_state import SamplingState
from server.engine.scheduler import ScheduledBatch, ScheduledRequest
from server.errors import InvalidRequest, UserError

MASK_GRACE = 0.002  # seconds that a step waits for a late grammar mask before it goes on without that request
LONG_GRACE = 0.05  # seconds
MASK_THREADS = 4  # so that a slow mask does not delay the others
NOT_FINITE = "the model gave a logit that is not a finite number"
HIDDEN_NOT_FINITE = "the model gave a hidden state that is not a finite number"


@dataclass
class BatchResult:
    """By request id: the sampled token, its log-probability, and log-probabilities and hidden states of prompt tokens.

    `ended`: the text is complete, with this step's token or, if it has none, since no other may follow.
    `deferred`: the mask was not ready, so the last token is to be computed again and sampled then.
    `errors`: the grammar cannot be followed, no token is allowed, or the model's numbers are not finite; the request
    has no token and must end.
    `redrawn`: the step in flight has taken their token for another one.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, Logprobs] = field(default_factory=dict)
    hidden: dict[str, Floats] = field(default_factory=dict)  # [n, layers, d]
    ended: set[str] = field(default_factory=set)
    deferred: set[str] = field(default_factory=set)
    errors: dict[str, Exception] = field(default_factory=dict)
    redrawn: Sequence[Request] = ()


@dataclass
class Flight:
    """A step that was submitted, and what its results belong to. Its requests may have moved on since."""

    scheduled: ScheduledBatch
    batch: Batch
    handle: Handle
    sampled: Sequence[Request]  # in the order of the sampling rows
    generated: Sequence[int]  # how many tokens each of them had
    runs: Sequence[tuple[Request, int, int, int]]  # scored requests: first scored row, the one after the last, top
    hidden: Sequence[tuple[str, tuple[int, ...], Ints]]  # as `_wanted_rows`


class ModelRunner:
    """Owns the backend and its cache; everything it needs to know of a step is in the batch."""

    def __init__(self, backend: Backend, cache: LatentCache, compiler: GrammarCompiler) -> None:
        self.backend = backend
        self.cache = cache
        self.compiler = compiler
        self._mask_pool = ThreadPoolExecutor(MASK_THREADS, "grammar")
        # what a request needs from one token to the next lives as long as the request
        self._grammars: WeakKeyDictionary[Request, GrammarState] = WeakKeyDictionary()
        self._states: WeakKeyDictionary[Request, SamplingState] = WeakKeyDictionary()

    def run(self, scheduled: ScheduledBatch) -> BatchResult:
        """Compute a step. The cache holds the batch's keys and values afterwards."""
        return self.collect(self.submit(scheduled))

    def submit(self, scheduled: ScheduledBatch, last: Flight | None = None) -> Flight:
        """Begin a step, while `last` may be in flight: tokens that it samples are taken over on the device."""
        items = scheduled.items
        self._start_masks(scheduled)
        batch, runs = self._batch(scheduled, last)
        requests, sampling = self._sampling(scheduled)
        generated = [request.num_generated for request in requests]
        hidden = list(_wanted_rows(items)) if batch.hidden else ()
        handle = self.backend.submit(batch, sampling)
        if scheduled.copies:
            sources, destinations = zip(*scheduled.copies, strict=True)
            self.backend.copy_blocks(sources, destinations)
        return Flight(scheduled, batch, handle, requests, generated, runs, hidden)

    def collect(self, flight: Flight) -> BatchResult:
        """Wait for a step's results."""
        requests, handle = flight.sampled, flight.handle
        result = BatchResult()
        masks: dict[str, Mask] = {}
        if constrained := [request for request in requests if request.params.grammar]:
            self.backend.wait(handle)  # masks are late when the forward pass is done, not when it is launched
            masks = self._join_masks(constrained, len(flight.scheduled.items), result)
        allowed = {i: masks[request.id] for i, request in enumerate(requests) if request.id in masks} if masks else {}
        found = self.backend.collect(handle, allowed)
        self._take_tokens(flight, found, result)
        result.redrawn = [requests[i] for i in found.redrawn]
        if constrained:
            following = zip(requests, flight.generated, strict=True)
            self._advance_grammars([(r, n) for r, n in following if r.params.grammar and r.id in result.tokens], result)
        columns = Logprobs(*found.prompt_scores)
        for request, first, end, top in flight.runs:
            if found.broken_prompt and not found.broken_prompt.isdisjoint(range(first, end)):
                result.errors[request.id] = FloatingPointError(NOT_FINITE)
            else:
                result.prompt_logprobs[request.id] = columns.part(first, end, top)
        if flight.hidden:
            self._take_hidden(flight, found.hidden, result)
        return result

    def _take_tokens(self, flight: Flight, found: StepResult, result: BatchResult) -> None:
        """Each request's token and its log-probability, or why it has none."""
        tokens = [token for token in found.tokens if token is not None]
        if len(tokens) == len(flight.sampled) and not found.scores:  # as a rule, of hundreds of rows
            result.tokens = dict(zip((request.id for request in flight.sampled), tokens, strict=True))
            return
        for i, (request, token) in enumerate(zip(flight.sampled, found.tokens, strict=True)):
            if i in found.broken:
                result.errors[request.id] = FloatingPointError(NOT_FINITE)
            elif i in found.stuck and self._may_end(request, flight.generated[i]):
                result.ended.add(request.id)
            elif i in found.stuck:
                result.errors[request.id] = _nothing_left(request, flight.generated[i])
            if token is None:
                continue
            result.tokens[request.id] = token
            if i in found.scores:
                result.logprobs[request.id] = Logprobs(*found.scores[i])

    def close(self) -> None:
        """End the threads and processes that grammars have needed."""
        self._mask_pool.shutdown(wait=False, cancel_futures=True)
        self.compiler.close()

    def _batch(
        self, scheduled: ScheduledBatch, last: Flight | None
    ) -> tuple[Batch, list[tuple[Request, int, int, int]]]:
        """The step's arrays; and for each scored request its first scored row, the one after its last, and its top."""
        items, block_size = scheduled.items, self.cache.block_size
        spans = [
            Span(request.num_computed_tokens, num_tokens, request.block_table, is_decode, request.branches)
            for request, num_tokens, is_decode in items
            if num_tokens  # a follower samples from its leader's last row
        ]
        ids: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        tops: list[int] = []
        runs = []
        measured: list[tuple[int, Measured]] = []
        at = 0
        for item in items:
            request, computed = item.request, item.request.num_computed_tokens
            start = at - computed
            at += item.num_tokens
            if item.is_decode:
                ids.append(request.token_ids[computed] if computed < len(request.token_ids) else 0)
                continue
            ids += _input_ids(item)
            if scored := request.scored(computed, item.num_tokens):
                first, top = len(rows), request.params.prompt_logprobs or 0
                rows += [start + token for token, _ in scored]
                targets += [request.token_ids[target] for _, target in scored]
                tops += [top] * len(scored)
                runs.append((request, first, len(rows), top))
                _add_run(measured, len(rows), _measured(request))
        filled = set[int]()
        if scheduled.new_blocks:
            filled = {block for item in items for block in _filled_blocks(item, block_size)}
        batch = Batch.build(
            ids,
            spans,
            block_size,
            scored=ScoredRows(
                np.array(rows, dtype=np.int64),
                np.array(targets, dtype=np.int64),
                np.array(tops, dtype=np.int64),
                measured if any(wanted is not NOT_MEASURED for _, wanted in measured) else (),
            ),
            zero_blocks=[block for block in scheduled.new_blocks if block not in filled],
            hidden=_hidden_rows(items),
            carried=_carried(items, last),
        )
        return batch, runs

    @staticmethod
    def _take_hidden(flight: Flight, found: Mapping[int, Floats], result: BatchResult) -> None:
        """Each request's hidden states out of a step's, which are by layer."""
        for request_id, layers, rows in flight.hidden:
            columns = []
            for layer in layers:
                first = int(np.searchsorted(flight.batch.hidden[layer], rows[0]))
                columns.append(found[layer][first : first + len(rows)])
            states = np.stack(columns, axis=1)
            if np.isfinite(states).all():
                result.hidden[request_id] = states
            else:
                result.errors[request_id] = FloatingPointError(HIDDEN_NOT_FINITE)

    def _sampling(self, scheduled: ScheduledBatch) -> tuple[Sequence[Request], Sequence[SamplingRow]]:
        requests, rows, at = [], [], 0
        for (request, num_tokens, _), samples in zip(scheduled.items, scheduled.samples, strict=True):
            at += num_tokens
            if samples:
                requests.append(request)
                rows.append(self._state(request).row(request, at - 1))
        return requests, rows

    def _start_masks(self, scheduled: ScheduledBatch) -> None:
        """Compute what grammars allow beside the forward pass."""
        for (request, _, _), samples in zip(scheduled.items, scheduled.samples, strict=True):
            if samples and (spec := request.params.grammar):
                if request not in self._grammars:
                    self._grammars[request] = GrammarState(self.compiler, spec)
                self._grammars[request].start(self._mask_pool)

    def _join_masks(self, constrained: Sequence[Request], of: int, result: BatchResult) -> dict[str, Mask]:
        """Masks of those of a step's `of` requests that can be sampled now; the others are named in the result.

        A late mask costs the other requests no more than MASK_GRACE, or LONG_GRACE if more than half of the step is
        late.
        """
        jobs = [self._grammars[request].start(self._mask_pool) for request in constrained]
        late = wait(jobs, timeout=MASK_GRACE).not_done
        until = time.monotonic() + LONG_GRACE
        while 2 * len(late) > of and (left := until - time.monotonic()) > 0:
            late = wait(late, timeout=left, return_when=FIRST_COMPLETED).not_done
        masks = {}
        for request, job in zip(constrained, jobs, strict=True):
            if job in late:
                result.deferred.add(request.id)
                continue
            try:
                mask = self._grammars[request].take()
            except UserError as error:
                result.errors[request.id] = error
                continue
            if mask is None:
                result.ended.add(request.id)
            else:
                masks[request.id] = mask
        return masks

    def _may_end(self, request: Request, generated: int) -> bool:
        """Whether the text is complete with so many tokens: by its grammar, or else by min_tokens."""
        if request.params.grammar:
            return self._grammars[request].accepts
        return generated >= request.params.min_tokens

    def _advance_grammars(self, followed: Sequence[tuple[Request, int]], result: BatchResult) -> None:
        """Grammars follow the tokens beside this thread, after so many earlier ones each. One that is late costs the
        others no more than MASK_GRACE; should its text be complete, its next mask says so. Where there will be none, it
        gets LONG_GRACE."""
        jobs = [self._grammars[request].advance(result.tokens[request.id], self._mask_pool) for request, _ in followed]
        if late := wait(jobs, timeout=MASK_GRACE).not_done:
            last: list[Future[bool]] = [
                job
                for (request, generated), job in zip(followed, jobs, strict=True)
                if job in late and generated + 1 >= request.params.max_tokens
            ]
            wait(last, timeout=LONG_GRACE)
        for (request, _), job in zip(followed, jobs, strict=True):
            if not job.done():
                continue
            if (error := job.exception()) is not None and request.params.grammar:
                result.errors[request.id] = failure_of(request.params.grammar, error)
                del result.tokens[request.id]
            elif job.result():
                result.ended.add(request.id)

    def _state(self, request: Request) -> SamplingState:
        found = self._states.get(request)
        if found is None:
            found = self._states[request] = SamplingState(request, self.compiler.eos_token_ids)
        return found


def _measured(request: Request) -> Measured:
    params = request.params
    if not (params.prompt_entropies or params.prompt_rows or params.prompt_mass_of is not None):
        return NOT_MEASURED
    return Measured(params.prompt_entropies, params.prompt_mass_of, params.prompt_rows)


def _add_run(runs: list[tuple[int, Measured]], end: int, wanted: Measured) -> None:
    """Scored rows up to `end`; they join the run before them if the same is wanted of both."""
    if runs:
        last = runs[-1][1]
        if (last.entropy, last.rows) == (wanted.entropy, wanted.rows) and last.mass_of is wanted.mass_of:
            runs.pop()
            wanted = last
    runs.append((end, wanted))


def _nothing_left(request: Request, generated: int) -> InvalidRequest:
    params = request.params
    named = [name for name in ("allowed_token_ids", "bad_words", "min_tokens") if getattr(params, name)]
    param = named[0] if named else "logit_bias"
    others = [*named[1:], *([params.grammar.param] if params.grammar else [])]
    beside = f" beside {' and '.join(others)}" if others else ""
    return InvalidRequest(
        f"{param}: after {generated} tokens no token is left that may be generated{beside}, and the "
        "text is not complete",
        param=param,
    )


def _wanted_rows(items: list[ScheduledRequest]) -> Iterator[tuple[str, tuple[int, ...], Ints]]:
    """The requests that want hidden states of this step, of which layers, and which rows of the batch those are."""
    at = 0
    for request, num_tokens, _ in items:
        start = request.num_computed_tokens
        if request.hidden is not None and (wanted := request.hidden.spec.within(start, start + num_tokens)):
            yield request.id, request.hidden.spec.layers, np.array(wanted, dtype=np.int64) + (at - start)
        at += num_tokens


def _hidden_rows(items: list[ScheduledRequest]) -> dict[int, Ints]:
    """The rows of a step whose hidden states are wanted, by layer."""
    rows: dict[int, list[Ints]] = {}
    for _, layers, wanted in _wanted_rows(items):
        for layer in layers:
            rows.setdefault(layer, []).append(wanted)
    return {layer: np.concatenate(parts) for layer, parts in rows.items()}


def _filled_blocks(item: ScheduledRequest, block_size: int) -> list[int]:
    """Blocks that the step writes from their first token to their last."""
    start = item.request.num_computed_tokens
    return item.request.block_table[-(-start // block_size) : (start + item.num_tokens) // block_size]


def _input_ids(item: ScheduledRequest) -> list[int]:
    """0 for one that is still being sampled."""
    start = item.request.num_computed_tokens
    found = item.request.token_ids[start : start + item.num_tokens]
    return found if len(found) == item.num_tokens else [*found, 0]


def _carried(items: list[ScheduledRequest], last: Flight | None) -> Ints | None:
    """For each row of a step the sampling row of the last one that is its token; -1 where the token is known."""
    if last is None:
        return None
    places: dict[Request, int] = {}
    found: list[int] = []
    for request, num_tokens, _ in items:
        found += [-1] * num_tokens
        if request.num_pending and request.num_computed_tokens + num_tokens == request.num_tokens and num_tokens:
            places = places or {sampled: i for i, sampled in enumerate(last.sampled)}
            found[-1] = places[request]
    return np.array(found, dtype=np.int64) if places else None
