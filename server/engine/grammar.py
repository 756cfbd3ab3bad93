"""Grammars that generated text must match: compiled once with llguidance, followed token by token.

Kinds: any JSON object, a JSON schema, a regular expression of the whole text (Rust's syntax; no look-around), a list
of choices, a grammar in llguidance's Lark dialect or in llama.cpp's GBNF, text with calls of functions. Between the
parts of a JSON text there is nothing, one space, or a newline and up to 16 spaces; nothing before the first part or
after the last, so that a model cannot go on with white space for ever. Its numbers end, too (`schema_forms`).

A request whose text is complete and cannot go on ends at once. Where it could both end and go on, the model decides:
the end of the text is allowed as soon as what there is matches. A model without an end-of-text token goes on until
its text cannot, or until its max_tokens.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import llguidance
import numpy as np
import numpy.typing as npt

from server.engine.grammar_source import MAX_STEP_SECONDS, NOTHING_FITS, check_length, first_line, new_matcher
from server.engine.grammar_workers import NICENESS, GrammarWorkers
from server.engine.request import GrammarSpec
from server.engine.tokenizer import Tokenizer
from server.engine.vocabulary import Vocabulary
from server.errors import InvalidRequest, UserError

CACHED_GRAMMARS = 128
CACHED_GRAMMAR_BYTES = 256 << 20
COMPILE_THREADS = 2


class GrammarFailed(InvalidRequest):
    """A grammar that compiled cannot be followed any further."""


class GrammarCompiler:
    """Compiled grammars for one tokenizer, the latest ones cached. Safe to use from several threads.

    A grammar that is not known is tried out in a process of its own first (`grammar_workers`). Refusals are kept, too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = tokenizer.eos_token_ids
        self.mask_size = tokenizer.vocab_size + (tokenizer.eos_token_id is None)
        self.pool = ThreadPoolExecutor(COMPILE_THREADS, "grammar-compile", initializer=_stand_back)
        self._tools: tuple[GrammarWorkers, llguidance.LLTokenizer] | None = None  # made by the first grammar
        self._making = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], _Compiled | str] = OrderedDict()  # str: why it is refused
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> None:
        """Check a grammar and have it ready; up to seconds for a large one, without the GIL.

        Raises:
            InvalidRequest: it cannot be compiled; the message says where and why, `param` is the spec's.
        """
        self._compiled(spec)

    def matcher(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        """A matcher at the beginning of the text. Raises as `compile` does."""
        return self._compiled(spec).deep_copy()

    def knows(self, spec: GrammarSpec) -> bool:
        """Whether `compile` and `matcher` answer at once."""
        with self._lock:
            return _key(spec) in self._cache

    def close(self) -> None:
        """End the threads and processes; what has been compiled can still be used."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self._making:
            if self._tools is not None:
                self._tools[0].close()

    def _compiled(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        with self._lock:
            if (found := self._cache.get(_key(spec))) is not None:
                self._cache.move_to_end(_key(spec))
        if found is None:
            check_length(spec)
            with self._making:
                if self._tools is None:
                    vocabulary = _vocabulary(self._tokenizer)
                    self._tools = GrammarWorkers(vocabulary), vocabulary.native()
            found = _try_out(*self._tools, spec)
            self._keep(spec, found)
        if isinstance(found, str):
            inside = found.partition(":")[0]  # of the field: a function of several
            raise InvalidRequest(f"{spec.param}{found}", param=f"{spec.param}{inside}")
        return found.matcher

    def _keep(self, spec: GrammarSpec, found: _Compiled | str) -> None:
        with self._lock:
            if _key(spec) in self._cache:
                return
            self._cache[_key(spec)] = found
            self._cached_bytes += _bytes_of(found)
            while len(self._cache) > 1 and (
                len(self._cache) > CACHED_GRAMMARS or self._cached_bytes > CACHED_GRAMMAR_BYTES
            ):
                self._cached_bytes -= _bytes_of(self._cache.popitem(last=False)[1])


@dataclass(frozen=True)
class _Compiled:
    """A matcher at the beginning of the text, and the bytes that it took where it was tried out."""

    matcher: llguidance.LLMatcher
    bytes: int


def _try_out(workers: GrammarWorkers, vocabulary: llguidance.LLTokenizer, spec: GrammarSpec) -> _Compiled | str:
    """A grammar that a worker could compile, or what an error says after the field's name."""
    try:
        source, size = workers.try_out(spec)
    except InvalidRequest as error:
        return error.message.removeprefix(spec.param)
    matcher = new_matcher(vocabulary, source, spec)
    if matcher.is_error():
        return f": cannot be compiled: {first_line(matcher.get_error())}"
    return _Compiled(matcher, size)


def _key(spec: GrammarSpec) -> tuple[str, str]:
    return spec.kind, spec.text


def _bytes_of(found: _Compiled | str) -> int:
    return found.bytes if isinstance(found, _Compiled) else len(found)


def _stand_back() -> None:
    """Let the engine's threads go before this one."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class GrammarState:
    """One request's way through its grammar. `start` computes a mask elsewhere; the rest waits until that is done."""

    def __init__(self, compiler: GrammarCompiler, spec: GrammarSpec) -> None:
        self._compiler = compiler
        self._spec = spec
        self._matcher: llguidance.LLMatcher | None = None
        self._mask = np.zeros(-(-compiler.mask_size // 32) * 4, np.uint8)
        self._job: Future[None] | None = None

    def start(self, pool: Executor) -> Future[None]:
        """Compute which tokens may come next; a job that has not been taken is not started again."""
        if self._job is None:
            known = self._matcher is not None or self._compiler.knows(self._spec)
            self._job = (pool if known else self._compiler.pool).submit(self._fill)
        return self._job

    def _fill(self) -> None:
        if self._matcher is None:
            self._matcher = self._compiler.matcher(self._spec)
        self._compute()

    def _compute(self) -> None:
        assert self._matcher is not None
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)  # without the GIL
        if self._matcher.is_error():
            raise _failed(self._spec, _failure(self._matcher))
        self._check_time(began)

    def _check_time(self, began: float) -> None:
        """What has become slow, and would become slower with every token, ends here."""
        if time.thread_time() - began > MAX_STEP_SECONDS:
            reason = f"is too complex here: a single token takes more than {MAX_STEP_SECONDS:g} seconds"
            raise _failed(self._spec, reason)

    def take(self) -> npt.NDArray[np.uint8] | None:
        """The mask: a bit per token, lowest first; None if the text is complete and no token may follow.

        Raises:
            GrammarFailed: the grammar is too complex here, or no token of the vocabulary fits it.
            UserError: as `GrammarCompiler.compile`, if that has not been called before.
        """
        assert self._job is not None
        job, self._job = self._job, None
        if (error := job.exception()) is not None:
            raise failure_of(self._spec, error) from error
        if self._compiler.mask_size > self._compiler.vocab_size:  # the end of the text of a model without one
            byte, bit = divmod(self._compiler.vocab_size, 8)
            self._mask[byte] &= 0xFF ^ (1 << bit)
        first, *others = self._compiler.eos_token_ids or (None,)
        if first is not None and self._mask[first // 8] >> first % 8 & 1:  # llguidance has one EOS token
            for token_id in others:
                self._mask[token_id // 8] |= 1 << token_id % 8
        return self._mask if self._mask.any() else None

    @property
    def accepts(self) -> bool:
        """Whether the text matches as it is; to be read once its mask has been taken."""
        return self._matcher is not None and bool(self._matcher.is_accepting())

    def advance(self, token_id: int, pool: Executor) -> Future[bool]:
        """Follow a token that the last mask allowed, and go on with the next mask.

        Returns:
            Whether the text is complete and cannot go on; or GrammarFailed: the grammar is too complex here.
        """
        followed: Future[bool] = Future()
        self._job = pool.submit(self._follow, token_id, followed)
        return followed

    def _follow(self, token_id: int, followed: Future[bool]) -> None:
        assert self._matcher is not None
        try:
            began = time.thread_time()
            ended = token_id in self._compiler.eos_token_ids
            if not ended and not self._matcher.consume_token(token_id):
                raise _failed(self._spec, _failure(self._matcher))
            self._check_time(began)
        except BaseException as error:
            followed.set_exception(error)
            raise
        ended = ended or self._matcher.is_stopped()
        followed.set_result(ended)
        if ended:
            self._mask[:] = 0
        else:
            self._compute()


def failure_of(spec: GrammarSpec, error: BaseException) -> UserError:
    """What a job raised, for the request's user; a defect of llguidance, maybe even a panic, is named."""
    return error if isinstance(error, UserError) else _failed(spec, f"{type(error).__name__}: {error}")


def _failed(spec: GrammarSpec, reason: str) -> GrammarFailed:
    return GrammarFailed(f"{spec.param}: {reason}", param=spec.param)


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return Vocabulary(
        tokenizer.backend,
        tokens,
        sorted(i for i in tokenizer.special_ids if i < tokenizer.vocab_size),
        tokenizer.eos_token_id,
    )


def _failure(matcher: llguidance.LLMatcher) -> str:
    reason = first_line(matcher.get_error())
    return "no token of the vocabulary fits the grammar here" if reason == NOTHING_FITS else reason
