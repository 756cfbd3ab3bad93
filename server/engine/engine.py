"""The engine: requests in, one step at a time, outputs out. Synchronous; it knows nothing of HTTP or asyncio."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lpa_model.backends import select
from lpa_model.cache import bytes_per_token
from lpa_model.checkpoint import load_config, stored_weights
from lpa_model.config import LPAConfig
from lpa_model.folder import weights_hash
from server.engine.block_manager import BlockManager
from server.engine.detokenizer import Detokenizer, unfinished_bytes
from server.engine.fingerprint import Identity, fingerprint
from server.engine.generation_config import load_generation_config
from server.engine.grammar import GrammarCompiler
from server.engine.memory import release_freed_memory, retain_freed_memory, share_one_heap
from server.engine.model_runner import BatchResult, Flight, ModelRunner
from server.engine.request import (
    EngineStats,
    FinishedRequest,
    FinishReason,
    GrammarSpec,
    Request,
    RequestOutput,
    RequestStatus,
)
from server.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler
from server.engine.tokenizer import Tokenizer, load_tokenizer
from server.errors import ContextLength, InvalidRequest

logger = logging.getLogger(__name__)

DEFAULT_CACHE_SHARE = 0.1  # of the memory that is free at start-up
DEFAULT_CACHE_LIMIT = 2 << 30  # bytes


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The settings of the engine. Defaults, and what None means, are in `server/settings.py`."""

    dtype: str
    weights: str
    device: str
    threads: int | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    step_budget_ms: float
    block_size: int
    kv_cache_layout: str
    kv_cache_dtype: str
    kv_cache_memory: int | None
    enable_prefix_caching: bool
    batch_invariant: bool | None
    chat_template: str | None
    generation_config: Literal["auto", "none"]


@dataclass(frozen=True)
class BackendInfo:
    """What computes, and what faster backend does not and why."""

    name: str = ""
    types: str = ""  # of activations, and of weights and cache where they differ: "float32, int8 weights"
    batch_invariant: bool = False
    refused: tuple[tuple[str, str], ...] = ()  # (backend, reason and remedy)
    cache_bytes_per_token: int = 0  # over all layers
    dense_cache_bytes_per_token: int = 0  # of the dense twin, of the same type
    layout: str = ""  # of the cache
    weights_hash: str = ""  # of the model folder's configuration and weights
    load_seconds: float = 0.0  # from the folder to the first step that can run


class StepFailed(Exception):
    """A step raised; `outputs` end the requests that were in it, and their blocks are free."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        super().__init__(f"a step with {len(outputs)} requests failed")
        self.outputs = outputs


class Engine:
    """Continuous batching over one model: `add_request`, `abort`, `step` while `has_work`.

    `sampling_defaults` are fields of `SamplingParams` for requests that do not say otherwise. `fingerprint` names what
    a seed's validity hangs on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        identity: Identity,
        sampling_defaults: Mapping[str, float] | None = None,
        backend: BackendInfo = BackendInfo(),
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.sampling_defaults = dict(sampling_defaults or {})
        self.identity = identity
        self.fingerprint = fingerprint(identity.weights, identity.backend)
        self.backend = backend
        self.ahead = runner.backend.runs_ahead  # a step is scheduled and submitted while the one before it runs
        self._flight: Flight | None = None  # the step that runs
        self._is_warm = False
        self._submitted = self._collected = 0.0  # when it was submitted, and when the one before it was collected
        self._requests: dict[str, tuple[Request, Detokenizer]] = {}
        self._report = EngineStats()

    @property
    def model_config(self) -> LPAConfig:
        return self.runner.backend.config

    @property
    def max_model_len(self) -> int:
        return self.scheduler.max_model_len

    @property
    def has_work(self) -> bool:
        """Whether a request is running or waiting, or a step is in flight."""
        return bool(self._requests) or self._flight is not None

    def validate(
        self, token_ids: list[int], max_tokens: int, where: str = "prompt", limit_field: str = "max_tokens"
    ) -> None:
        """Check a request before it is queued; `where` and `limit_field` name prompt and max_tokens in messages.

        Raises:
            InvalidRequest: empty prompt or a token id outside the vocabulary.
            ContextLength: prompt and max_tokens are longer than the context.
        """
        if not token_ids:
            raise InvalidRequest(f"{where}: is empty; it must have at least one token", param=where)
        self.tokenizer.check(token_ids, where)
        size, total = len(token_ids), len(token_ids) + max_tokens
        if total > self.max_model_len:
            raise ContextLength(
                f"{where}: {size} tokens and {limit_field} {max_tokens} make {total}",
                self.max_model_len,
                param=where if size > self.max_model_len else limit_field,
            )

    def warm_up(self) -> None:
        """Compile and capture what the first step would otherwise wait for, in the thread that steps: a GPU's captures
        belong to its streams. `step` calls it first."""
        if self._is_warm:
            return
        self._is_warm, began = True, time.monotonic()
        self.runner.backend.warm_up(self.scheduler.max_num_seqs, self.max_model_len)
        seconds = self.backend.load_seconds + time.monotonic() - began
        self.backend = replace(self.backend, load_seconds=seconds)

    def compile_grammar(self, spec: GrammarSpec) -> None:
        """Have a grammar ready for its request; from any thread. Raises InvalidRequest if it cannot be compiled."""
        self.runner.compiler.compile(spec)

    def close(self) -> None:
        """End the threads and processes that grammars have needed. No step may follow."""
        self._flight = None
        self.runner.close()

    def add_request(self, request: Request) -> None:
        """Queue a request that `validate` has accepted."""
        params = request.params
        detokenizer = Detokenizer(
            self.tokenizer,
            params.stop,
            params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
            prefix=unfinished_bytes(self.tokenizer, request.token_ids),
        )
        self._requests[request.id] = (request, detokenizer)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request now and free its blocks; an unknown or finished id is ignored."""
        if entry := self._requests.get(request_id):
            self.scheduler.finish(entry[0], FinishReason.ABORT)
            self._close(entry[0])

    def abort_all(self) -> list[RequestOutput]:
        """End every request; the outputs say so."""
        ids = list(self._requests)
        for request_id in ids:
            self.abort(request_id)
        return [RequestOutput(request_id=i, finish_reason=FinishReason.ABORT) for i in ids]

    def step(self) -> list[RequestOutput]:
        """Schedule, run, advance. With a backend that can run `ahead`, the outputs are those of the step before, which
        has run meanwhile; there are none of the first one.

        Raises:
            StepFailed: the forward pass raised; requests outside this step are as they were, or begin anew.
        """
        self.warm_up()
        started = time.monotonic()
        batch = self.scheduler.schedule()
        if self.ahead:
            return self._step_ahead(batch)
        try:
            result = self.runner.run(batch)
        except Exception as error:
            raise self._failed(batch, error) from error
        self.scheduler.observe_step(batch, (time.monotonic() - started) * 1e3)
        return self._take(batch, result)

    def _step_ahead(self, batch: ScheduledBatch) -> list[RequestOutput]:
        """Submit a step, then take the results of the one that was in flight."""
        before, submitted = self._flight, self._submitted
        for reason, count in batch.held.items():
            self._report.held[reason] = self._report.held.get(reason, 0) + count
        if batch.items:
            self._submitted = time.monotonic()
            try:
                flight = self.runner.submit(batch, before)
            except Exception as error:
                raise self._failed(batch, error) from error
            self.scheduler.launch(batch)
            self._flight = flight
        else:
            self._flight = None
        if before is None:
            return []
        try:
            result = self.runner.collect(before)
        except Exception as error:
            failed = self._failed(before.scheduled, error)
            if self._flight is not None:  # it may have read what the failed one should have written
                self.scheduler.give_up(self._flight.scheduled)
                self._flight = None
            raise failed from error
        now = time.monotonic()
        # the device came to this step when it was done with the one before
        self.scheduler.observe_step(before.scheduled, (now - max(submitted, self._collected)) * 1e3)
        self._collected = now
        outputs = self._take(before.scheduled, result)
        for request in result.redrawn:
            if not self._is_outdated(request, before.scheduled):
                self.scheduler.recompute(request)
        self._report.steps_ahead += self._flight is not None
        return outputs

    def _take(self, batch: ScheduledBatch, result: BatchResult) -> list[RequestOutput]:
        """A step's outputs; requests that have ended since it was submitted have none."""
        outdated, failed = list[ScheduledRequest](), list[Request]()
        if batch.launched is not None:  # otherwise nothing has happened since
            outdated = [item for item in batch.items if self._is_outdated(item.request, batch)]
        self._count(batch, result, outdated)
        if result.errors:
            requests = (item.request for item in batch.items if item.request.id in result.errors)
            failed = [request for request in requests if not self._is_outdated(request, batch)]
        outputs = [self._fail(request, result.errors[request.id]) for request in failed]
        if failed and batch.launched is not None:
            self.scheduler.blocks.forget()  # their prompts could be found already
        updated = self.scheduler.update(batch, result.tokens, ended=result.ended, deferred=result.deferred)
        now = time.monotonic()
        advanced = [self._advance(request, token, result, now) for request, token in updated]
        return outputs + [output for output in advanced if output is not None]

    def _failed(self, batch: ScheduledBatch, error: Exception) -> StepFailed:
        logger.exception("a step failed")
        alive = [item.request for item in batch.items if not self._is_outdated(item.request, batch)]
        return StepFailed([self._fail(request, error) for request in alive])

    @staticmethod
    def _is_outdated(request: Request, batch: ScheduledBatch) -> bool:
        """Whether a step's results for a request count no more."""
        return request.status is RequestStatus.FINISHED or request.id in batch.void

    def _advance(self, request: Request, token: int | None, result: BatchResult, now: float) -> RequestOutput | None:
        """What a step that ran means for one of its requests; None if its prompt is not through yet."""
        if result.prompt_logprobs and request.id in result.prompt_logprobs:
            request.prompt_logprobs.extend(result.prompt_logprobs[request.id])
        if request.hidden is not None and request.id in result.hidden:
            request.hidden.add(result.hidden[request.id])
        _, detokenizer = self._requests[request.id]
        text = ""
        if token is not None:
            self._observe_token(request, now)
            # the end of text or a stop token, but not the last token of a grammar's text
            last = request.id in result.ended and token not in self.scheduler.eos_token_ids
            stopped = request.finish_reason is FinishReason.STOP and not last
            text = detokenizer.append(token) if not stopped or request.params.include_stop_str_in_output else ""
            if detokenizer.stopped is not None:
                self.scheduler.finish(request, FinishReason.STOP)
                request.finish_reason, request.stop_reason = FinishReason.STOP, detokenizer.stopped
        finished = None
        if request.status is RequestStatus.FINISHED:
            text += detokenizer.finish()
            finished = self._close(request)
        elif token is None:
            return None
        scored = request.params.prompt_logprobs is not None and request.num_output_tokens == (token is not None)
        return RequestOutput(
            request_id=request.id,
            text=text,
            token_ids=[] if token is None else [token],
            logprobs=result.logprobs.get(request.id),
            prompt_logprobs=request.prompt_logprobs if scored else None,
            hidden=request.hidden.result() if finished and request.hidden is not None else None,
            num_cached_tokens=request.num_cached_tokens,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            finished=finished,
        )

    def _fail(self, request: Request, error: Exception) -> RequestOutput:
        self.scheduler.finish(request, FinishReason.ERROR)
        return RequestOutput(
            request_id=request.id,
            finish_reason=FinishReason.ERROR,
            error=error.message if isinstance(error, InvalidRequest) else f"{type(error).__name__}: {error}",
            invalid_param=(error.param or "") if isinstance(error, InvalidRequest) else None,
            finished=self._close(request),
        )

    def _close(self, request: Request) -> FinishedRequest:
        """Forget and report a sequence that the scheduler has ended."""
        del self._requests[request.id]
        assert request.finish_reason is not None
        now = time.monotonic()
        scored = request.is_scoring and request.finish_reason is FinishReason.LENGTH
        finished = FinishedRequest(
            reason=request.finish_reason,
            choice=request.choice,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_generation_tokens=request.num_output_tokens,
            max_tokens=request.params.max_tokens,
            arrival=request.arrival,
            admission=request.admission,
            first_token=now if scored else request.first_token_time,
            last_token=request.last_token_time,
            end=now,
        )
        self._report.finished.append(finished)
        choices = request.choices
        choices.num_finished += 1
        choices.longest = max(choices.longest, request.num_output_tokens)
        if choices.num_finished == choices.n:
            self._report.finished_prompts.append((choices.n, choices.longest))
        return finished

    def _observe_token(self, request: Request, now: float) -> None:
        if request.last_token_time is None:
            request.first_token_time = now
            self._report.time_to_first_token.append(now - request.arrival)
        else:
            self._report.inter_token_latency.append(now - request.last_token_time)
        request.last_token_time = now

    def _count(self, batch: ScheduledBatch, result: BatchResult, outdated: Sequence[ScheduledRequest]) -> None:
        report = self._report
        report.step_tokens = batch.num_tokens
        report.prefix_cache_queries += batch.prefix_queries
        report.prefix_cache_hits += batch.prefix_hits
        report.prompt_tokens += batch.num_prompt_tokens + batch.prefix_hits
        report.generation_tokens += len(result.tokens)
        for request, num_tokens, _ in outdated:
            report.generation_tokens -= request.id in result.tokens
            report.discarded_tokens += num_tokens
        report.steps += 1
        report.scored_tokens += sum(len(scored.logprobs) for scored in result.prompt_logprobs.values())
        report.preemptions += batch.preempted

    def take_stats(self) -> EngineStats:
        """The state now, and what happened since this was last called."""
        report, self._report = self._report, EngineStats()
        report.num_running = len(self.scheduler.running)
        report.num_waiting = len(self.scheduler.waiting)
        report.num_deferred = self.scheduler.waiting.num_aside
        report.kv_cache_usage = self.scheduler.blocks.usage
        return report


def build_engine(model_dir: Path, options: EngineOptions, hashing: Future[str] | None = None) -> Engine:
    """Load a model folder and give it a cache. `hashing`: its `weights_hash`, if that is under way.

    Raises:
        CheckpointError: the folder cannot be used; the message names the file or tensor.
        ValueError: an option does not fit the model or the machine; the message names it.
    """
    share_one_heap()
    retain_freed_memory()  # before weights are packed: each matrix is packed by way of others that are freed at once
    # Every thread that computes keeps a team of OpenMP threads. With more of them than processors, none spins while it
    # waits, and each product of a small step takes 0.1 ms to wake its team: so this thread's team ends with it.
    with ThreadPoolExecutor(1, "loading") as loading, ThreadPoolExecutor(2, "beside") as beside:
        return loading.submit(_build_engine, model_dir, options, beside, hashing).result()


def _build_engine(model_dir: Path, options: EngineOptions, beside: Executor, hashing: Future[str] | None) -> Engine:
    began = time.monotonic()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    config = load_config(model_dir)
    hashing = hashing or beside.submit(weights_hash, model_dir)
    reading = beside.submit(load_tokenizer, model_dir, config, options.chat_template)
    choice = select.choose(
        config,
        dtype=options.dtype,
        weights=options.weights,
        stored=stored_weights(model_dir),
        device=options.device,
        layout=options.kv_cache_layout,
        cache_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        batch_invariant=options.batch_invariant is True,
    )
    invariant = choice.batch_invariant if options.batch_invariant is None else options.batch_invariant
    if invariant and not choice.batch_invariant:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
        raise ValueError(f"batch_invariant: the backend {choice.candidate.name} is not; {reasons}")
    backend = choice.load(model_dir)
    layout = choice.case.layout
    block_bytes = backend.cache_bytes_per_token(layout) * options.block_size
    if options.kv_cache_memory is None:
        affordable = min(DEFAULT_CACHE_LIMIT, int(backend.free_memory() * DEFAULT_CACHE_SHARE))
        longest = -(-(options.max_model_len or config.max_position_embeddings) // options.block_size)
        memory = min(affordable, options.max_num_seqs * longest * block_bytes)  # no more than sequences can fill
    else:
        memory = options.kv_cache_memory
    num_blocks = memory // block_bytes
    if num_blocks < 1:
        raise ValueError(f"kv_cache_memory: {memory} bytes do not hold one block of {block_bytes} bytes")
    max_model_len = _max_model_len(config, options.max_model_len, num_blocks * options.block_size)
    cache = backend.make_cache(layout, num_blocks, options.block_size)
    release_freed_memory()
    logger.info("backend: %s%s", backend.name, ", batch-invariant" if invariant else "")
    for name, reason in choice.refused:
        logger.info("backend %s was not taken: %s", name, reason)
    logger.info(
        "kv cache: layout %s, %d bytes per token, %d blocks of %d tokens = %d tokens (%.0f MiB)",
        layout,
        backend.cache_bytes_per_token(layout),
        num_blocks,
        options.block_size,
        num_blocks * options.block_size,
        num_blocks * block_bytes / 2**20,
    )
    tokenizer = reading.result()
    scheduler = Scheduler(
        BlockManager(num_blocks, options.block_size, options.enable_prefix_caching),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        step_budget_ms=options.step_budget_ms,
        eos_token_ids=tokenizer.eos_token_ids,
        max_model_len=max_model_len,
        recompute_decodes_one_by_one=invariant,
    )
    return Engine(
        ModelRunner(backend, cache, GrammarCompiler(tokenizer)),
        scheduler,
        tokenizer,
        Identity(hashing.result(), tokenizer.hash, backend.name),
        load_generation_config(model_dir).defaults(options.generation_config),
        BackendInfo(
            backend.name,
            choice.types,
            invariant,
            choice.refused,
            backend.cache_bytes_per_token(layout),
            bytes_per_token(config.vanilla(), "full", choice.case.cache_dtype),
            layout,
            hashing.result(),
            time.monotonic() - began,
        ),
    )


def _max_model_len(config: LPAConfig, asked: int | None, cache_tokens: int) -> int:
    limit = config.max_position_embeddings
    if asked is None:
        if cache_tokens < limit:
            logger.warning("the cache holds %d tokens: the context is cut from %d to that", cache_tokens, limit)
        return min(limit, cache_tokens)
    if asked > limit:
        raise ValueError(f"max_model_len: {asked} is more than the model's {limit} positions")
    if asked > cache_tokens:
        raise ValueError(f"max_model_len: {asked} is more than the {cache_tokens} tokens that the cache holds")
    return asked
