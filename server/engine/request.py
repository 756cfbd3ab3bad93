"""Value types of the engine: sampling parameters, a request and its state, outputs. No torch."""

from __future__ import annotations

import enum
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from server.engine.hidden_states import Floats, HiddenSpec, HiddenStates


@dataclass(frozen=True)
class GrammarSpec:
    """What generated text must match; `text` is the schema (JSON), expression, grammar or JSON list of choices.

    A strict schema is closed: every property is required, and no other may come. Kind `tools` is made by
    `tool_grammar.tool_spec`. `param` is the request's field that errors name; an error of tools names a field inside.
    """

    kind: Literal["json_object", "json_schema", "strict_schema", "regex", "choice", "grammar", "tools"]
    text: str
    param: str


HELD_BY = ("grammar", "penalties", "bad_words")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is generated or scored. Ranges are checked by the protocol."""

    max_tokens: int = 16  # 0: score the prompt only
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the best token's probability
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    grammar: GrammarSpec | None = None
    seed: int | None = None  # None: a fresh one per request
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per generated token; None: no log-probabilities
    prompt_logprobs: int | None = None  # alternatives per prompt token; None: no log-probabilities
    # with prompt_logprobs:
    prompt_entropies: bool = False
    prompt_mass_of: NDArray[np.int64] | None = field(default=None, compare=False)  # ids: how probable any of them was
    prompt_rows: bool = False  # the log-probabilities of all tokens, by id
    first_logit_position: int = 0  # prompt tokens after this position are scored; earlier ones may come from the cache

    @property
    def held_by(self) -> str | None:
        """The parameter, of HELD_BY, for which the host must know a token before the next one can be sampled; None if a
        step may be submitted whose last token is still being sampled."""
        penalized = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        found = (self.grammar is not None, penalized, any(len(words) > 1 for words in self.bad_words))
        return next((name for name, holds in zip(HELD_BY, found, strict=True) if holds), None)

    def without_prompt_logprobs(self) -> SamplingParams:
        """For the further choices of a prompt that the first one scores."""
        return self if self.prompt_logprobs is None else replace(self, prompt_logprobs=None)


class RequestStatus(enum.Enum):
    """WAITING in the queue (preempted requests go back there), RUNNING with blocks, FINISHED."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class FinishReason(enum.StrEnum):
    """Why a request ended; the first two are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass
class Logprobs:
    """Log-probabilities of a run of tokens, in columns: entry i belongs to token i of the run.

    Natural logarithms of the model's own distribution (before temperature and filters), from float32 logits.
    `top_ids` and `top_logprobs` list the most probable tokens, best first; `rank` counts from 1. The other columns are
    empty unless they were wanted: entropies in nats; the log-probability that the token is one of a set; and those of
    all tokens by id, float32 [vocab].
    """

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)
    rows: list[NDArray[np.float32] | None] = field(default_factory=list)

    def extend(self, other: Logprobs) -> None:
        """Append the columns of a later run."""
        self.logprobs += other.logprobs
        self.ranks += other.ranks
        self.top_ids += other.top_ids
        self.top_logprobs += other.top_logprobs
        self.entropies += other.entropies
        self.masses += other.masses
        self.rows += other.rows

    def part(self, start: int, end: int, top: int) -> Logprobs:
        """Entries `start` to `end`, with the `top` most probable tokens of each."""
        return Logprobs(
            self.logprobs[start:end],
            self.ranks[start:end],
            [ids[:top] for ids in self.top_ids[start:end]],
            [logprobs[:top] for logprobs in self.top_logprobs[start:end]],
            self.entropies[start:end],
            self.masses[start:end],
            self.rows[start:end],
        )


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """What one step (or several, merged by a slow reader) adds to a request."""

    request_id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None  # of token_ids
    prompt_logprobs: Logprobs | None = None  # of prompt tokens first_logit_position + 1 ..., with the first output
    hidden: Floats | None = None  # as `HiddenStates.result`, with the last output
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string
    error: str | None = None  # with FinishReason.ERROR
    invalid_param: str | None = None  # with it, where the request is at fault: the field
    finished: FinishedRequest | None = None  # with finish_reason

    def merge(self, later: RequestOutput) -> RequestOutput:
        """This output and the one that follows it as one."""
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs.extend(later.logprobs)
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs or later.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(kw_only=True)
class Completion:
    """What a sequence has generated so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=Logprobs)  # of token_ids, where requested
    prompt_logprobs: Logprobs | None = None  # as of RequestOutput
    hidden: Floats | None = None  # likewise
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None  # None: not finished
    stop_reason: int | str | None = None  # the stop token id or stop string

    def add(self, output: RequestOutput) -> None:
        """What comes next."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.hidden is not None:
            self.hidden = output.hidden
        self.num_cached_tokens = output.num_cached_tokens
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, in nats."""
        values = self.logprobs.logprobs
        return sum(values) / len(values) if values else float("-inf")


@dataclass
class Choices:
    """The sequences of one prompt, `n` of them."""

    n: int
    num_finished: int = 0
    longest: int = 0  # tokens generated by one of the finished


BACKGROUND = 1 << 63
"""The priority of background work, batch jobs: it runs on capacity that no other request uses. It is beyond the 64-bit
integers that clients may send."""


class Request:
    """One sequence in the scheduler.

    There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`, and a token is sampled
    each time it has. Where the engine runs one step ahead, both count a step as soon as it is submitted.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        branches: tuple[int, ...] = (),
        hidden: HiddenSpec | None = None,
        leader: Request | None = None,
        group: str | None = None,
        choices: Choices | None = None,
        arrival: float | None = None,
    ) -> None:
        """
        Args:
            branches: where the continuations begin that stand one after another behind a common beginning, of a
                prompt to be scored. Each sees that beginning and itself, and its positions go on from there.
            hidden: which hidden states of the prompt are wanted; with max_tokens 0.
            leader: a request with the same prompt and cache_salt whose computed prompt this one takes over.
            group: the HTTP request that it belongs to, by default one of its own; groups share the places fairly.
            choices: those of its prompt, which it is one of; by default it is the only one.
            arrival: on `time.monotonic`, by default now.
        """
        self.id = request_id
        self.params = params
        self.choice = choice
        self.priority = priority  # smaller goes first, as in vLLM
        self.cache_salt = cache_salt  # prefix blocks are shared only between equal salts
        self.branches = branches
        self.leader = leader
        self.group = request_id if group is None else group
        self.choices = Choices(1) if choices is None else choices
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.num_prompt_tokens = len(prompt_ids)
        self.token_ids = list(prompt_ids)  # prompt and generated, as far as they are known
        self.num_pending = 0  # tokens behind them that steps in flight sample
        self.held_by = params.held_by
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the prompt, at first admission; a follower's are its leader's
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the full blocks, in order
        self.prompt_logprobs = Logprobs()
        self.hidden = None if hidden is None else HiddenStates(hidden)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.arrival = time.monotonic() if arrival is None else arrival
        self.admission: float | None = None  # to its first step
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        # smallest first: priority, turn of the group, arrival, number; the scheduler numbers requests, from 1
        self.order: tuple[int, float, float, int] = (priority, 0.0, self.arrival, 0)
        self.followers: dict[Request, int] = {}  # waiting for this one's whole prompt
        self.waiters: dict[Request, int] = {}  # waiting for this one to have computed so many tokens

    @property
    def is_scoring(self) -> bool:
        """Whether nothing is to be generated."""
        return self.params.max_tokens == 0

    @property
    def is_background(self) -> bool:
        """Whether it runs only on capacity that no other request uses."""
        return self.priority == BACKGROUND

    @property
    def was_admitted(self) -> bool:
        """Whether it has ever run."""
        return self.admission is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those that are still being sampled included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Output tokens, those that are still being sampled included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens the model must see; the last token of a scored prompt predicts nothing that is asked."""
        return max(1, self.num_tokens - (self.is_scoring and self.hidden is None))

    @property
    def max_cached_tokens(self) -> int:
        """Prefix hits end here: the position whose logits or hidden state is needed first must be computed."""
        last = self.num_tokens_to_compute - 1
        if self.hidden is not None:
            last = min(last, self.hidden.spec.positions[0])
        if self.params.prompt_logprobs is None or self.num_generated:
            return last
        return min(last, self.params.first_logit_position)

    def can_follow(self, leader: Request) -> bool:
        """Whether it can take over the prompt of a leader, which must have been queued and not yet generated."""
        return (
            leader.order[-1] > 0
            and leader.status is not RequestStatus.FINISHED
            and not leader.num_generated
            and not (leader.is_scoring or self.is_scoring)
            and self.params.prompt_logprobs is None
            and self.cache_salt == leader.cache_salt
            and self.token_ids == leader.token_ids
        )

    @property
    def num_shareable_tokens(self) -> int:
        """Tokens at the beginning whose blocks other requests may use."""
        return self.branches[0] if self.branches else self.num_prompt_tokens

    def scored(self, computed: int, num_tokens: int) -> list[tuple[int, int]]:
        """(i, t) of what `num_tokens` tokens after `computed` ones score: token i gives the log-probability of token t.

        The last token before the branches does so for the first one of each.
        """
        if self.params.prompt_logprobs is None or self.num_generated:
            return []
        first = max(computed, self.params.first_logit_position)
        last = min(computed + num_tokens, self.num_prompt_tokens - 1)
        if not self.branches:
            return [(i, i + 1) for i in range(first, last)]
        trunk = self.branches[0] - 1
        starts = set(self.branches)
        found = [(trunk, start) for start in self.branches if first <= trunk < last]
        found += [(i, i + 1) for i in range(first, last) if i + 1 not in starts]
        return sorted(found)

    def num_scored(self, computed: int, num_tokens: int) -> int:
        """How many log-probabilities of prompt tokens `num_tokens` tokens after `computed` ones give."""
        if self.params.prompt_logprobs is None or self.num_generated:
            return 0
        if self.branches:
            return len(self.scored(computed, num_tokens))
        first = max(computed, self.params.first_logit_position)
        return max(0, min(computed + num_tokens, self.num_prompt_tokens - 1) - first)


@dataclass(frozen=True)
class Measures:
    """What is wanted of each scored token beside its log-probability and rank."""

    top: int = 0  # the most probable tokens
    entropy: bool = False
    mass_of: NDArray[np.int64] | None = None  # as `SamplingParams.prompt_mass_of`
    rows: bool = False  # the log-probabilities of all tokens, by id


NO_MORE = Measures()


def scoring_request(
    request_id: str,
    token_ids: list[int],
    first: int,
    measures: Measures = NO_MORE,
    branches: tuple[int, ...] = (),
    group: str | None = None,
    *,
    priority: int = 0,
    cache_salt: str = "",
) -> Request:
    """A request for the log-probabilities of token_ids[first:], first at least 1, and what else is to be measured.

    The other arguments are those of `Request`. With branches, `first` is branches[0], and the first tokens of all
    branches come first.
    """
    params = SamplingParams(
        max_tokens=0,
        prompt_logprobs=measures.top,
        prompt_entropies=measures.entropy,
        prompt_mass_of=measures.mass_of,
        prompt_rows=measures.rows,
        first_logit_position=first - 1,
    )
    return Request(
        request_id, token_ids, params, branches=branches, group=group, priority=priority, cache_salt=cache_salt
    )


def hidden_request(request_id: str, token_ids: list[int], spec: HiddenSpec, group: str | None = None) -> Request:
    """A request for hidden states of token_ids, which is computed up to the last position that is wanted."""
    params = SamplingParams(max_tokens=0)
    return Request(request_id, token_ids[: spec.positions[-1] + 1], params, hidden=spec, group=group)


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """What metrics, log and traces want to know of a sequence that has ended.

    Instants are on `time.monotonic`, intervals in seconds.
    """

    reason: FinishReason
    choice: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    max_tokens: int
    arrival: float
    admission: float | None  # None: it never ran
    first_token: float | None  # or the end of scoring; None: it ended before
    last_token: float | None
    end: float

    @property
    def e2e(self) -> float:
        return self.end - self.arrival

    @property
    def queue(self) -> float:
        """Until its first step, or the end if there was none."""
        return (self.end if self.admission is None else self.admission) - self.arrival

    @property
    def prefill(self) -> float | None:
        """First step to first token, or to the end of scoring."""
        return None if self.admission is None or self.first_token is None else self.first_token - self.admission

    @property
    def decode(self) -> float | None:
        """First token to last."""
        return None if self.first_token is None or self.last_token is None else self.last_token - self.first_token

    @property
    def inference(self) -> float | None:
        """First step to last token, or to the end of scoring."""
        last = self.first_token if self.last_token is None else self.last_token
        return None if self.admission is None or last is None else last - self.admission

    @property
    def time_per_output_token(self) -> float | None:
        """Mean from one token to the next; None of fewer than two."""
        if self.decode is None or self.num_generation_tokens < 2:
            return None
        return self.decode / (self.num_generation_tokens - 1)


@dataclass(kw_only=True)
class EngineStats:
    """State now, and what happened since the last report; times in seconds."""

    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0  # of those waiting: set aside until another one has computed what they share with it
    kv_cache_usage: float = 0.0  # 0 to 1
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    prompt_tokens: int = 0  # computed or taken from the cache
    generation_tokens: int = 0
    scored_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    steps_ahead: int = 0  # of these, those whose results were awaited while the next one ran
    discarded_tokens: int = 0  # computed one step ahead, for sequences that had ended
    held: dict[str, int] = field(default_factory=dict)  # decodes that could not go ahead, by the parameter's name
    step_tokens: int = 0  # of the last step; 0: there was none
    time_to_first_token: list[float] = field(default_factory=list)
    inter_token_latency: list[float] = field(default_factory=list)
    finished: list[FinishedRequest] = field(default_factory=list)
    finished_prompts: list[tuple[int, int]] = field(default_factory=list)  # (sequences, tokens of the longest)
