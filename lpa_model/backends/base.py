"""The contract between the engine and the code that computes: what every backend takes, returns and guarantees.

No torch operation, no device and no instruction set is named here. `select` says which backend a model gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lpa_model.batch import Batch, Ints
from lpa_model.config import CacheLayout, LPAConfig

if TYPE_CHECKING:
    from lpa_model.cache import LatentCache

Mask = npt.NDArray[np.uint8]
"""A bit per token, lowest first, in vocab / 8 bytes or more; 0: not allowed."""
Floats = npt.NDArray[np.float32]
Handle = Any
"""A submitted step: what `collect` needs of it. Each backend has its own."""


@dataclass(kw_only=True, slots=True)
class SamplingRow:
    """How the next token after one row of a batch is sampled; ids are distinct within each array."""

    row: int  # of the batch
    temperature: float = 1.0  # 0: the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    draws: Callable[[int], float] = lambda attempt: 0.0  # numbers in [0, 1), each used once; see `uniform`
    allowed: Ints | None = None
    banned: Sequence[int] = ()
    bias_ids: Ints | None = None
    bias: Floats | None = None
    seen: Ints | None = None  # tokens that penalties apply to
    counts: Floats | None = None  # how often each of them was generated; 0: it is in the prompt only
    logprobs: int | None = None  # how many of the most probable tokens are reported; None: no log-probabilities
    constrained: bool = False  # a grammar mask comes with `collect`


class Scores(NamedTuple):
    """Log-probabilities of given tokens, in columns; natural logarithms, from float32 logits."""

    logprobs: list[float]
    ranks: list[int]  # from 1, by logit, then by id
    top_ids: list[list[int]]  # the most probable tokens, best first, equal ones by id
    top_logprobs: list[list[float]]
    # of `Measured`, empty where no row of the step wants any of them:
    entropies: list[float]  # NaN where not wanted
    masses: list[float]  # log-probability that the token is one of `mass_of`; NaN where not wanted
    rows: list[Floats | None]  # [vocab]: of all tokens, by id; None where not wanted


@dataclass
class StepResult:
    """A step's tokens and scores; lists are in the order of the sampling rows."""

    tokens: list[int | None]  # None: the row was constrained and had no mask, or is in one of these sets
    redrawn: set[int] = field(default_factory=set)  # indices into `tokens`: a later step was given another id for them
    stuck: set[int] = field(default_factory=set)  # indices into `tokens`: everything was forbidden
    broken: set[int] = field(default_factory=set)  # indices into `tokens`: a logit is not finite
    broken_prompt: set[int] = field(default_factory=set)  # indices into the batch's scored rows: likewise
    scores: dict[int, Scores] = field(default_factory=dict)  # of the sampled token, by index into `tokens`
    prompt_scores: Scores = field(
        default_factory=lambda: Scores([], [], [], [], [], [], [])
    )  # of the batch's scored rows
    hidden: dict[int, Floats] = field(default_factory=dict)  # [n, d] by layer: of the batch's `hidden`


class Backend(Protocol):
    """One way of computing a loaded model. Used from one thread at a time.

    A step that raises leaves the cache's other blocks as they were.
    """

    name: str
    """For example "cpu (AVX2, bfloat16)"; printed at the start, in `lpa info`, /version and lpa:build_info."""
    batch_invariant: bool
    """A row's bits depend on the row alone: not on the other rows of its step, on chunking or on threads."""
    runs_ahead: bool
    """Sampled ids stay on the device: a step may be submitted before the one ahead of it is collected, and take ids
    from it (`Batch.carried`)."""
    config: LPAConfig

    def cache_bytes_per_token(self, layout: CacheLayout) -> int:
        """Bytes that one cached token takes over all layers, padding included."""
        ...

    def free_memory(self) -> int:
        """Bytes of the device that a cache could take now."""
        ...

    def make_cache(self, layout: CacheLayout, num_blocks: int, block_size: int) -> LatentCache:
        """Allocate the pools, in the arrangement that this backend reads. Called once, before the first step."""
        ...

    def submit(self, batch: Batch, sampling: Sequence[SamplingRow]) -> Handle:
        """Begin a step: write the batch's keys and values, compute its hidden states and, where `runs_ahead`, sample.

        Returns before a device has finished. Grammar masks may be computed meanwhile. A step runs after the steps that
        were submitted before it, whether or not they are collected. At most one of them is in flight, and `carried`
        rows belong to its sampling rows that are not constrained.
        """
        ...

    def wait(self, handle: Handle) -> None:
        """Return when the forward pass is done."""
        ...

    def collect(self, handle: Handle, masks: Mapping[int, Mask]) -> StepResult:
        """Sample and score the submitted step.

        Args:
            handle: from `submit`; each is collected once, in order, or dropped.
            masks: by index into the sampling rows; a constrained row without one gets no token.
        """
        ...

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy whole cache blocks in every layer, after the steps submitted so far."""
        ...

    def warm_up(self, most_rows: int, longest: int) -> None:
        """Load, pack, compile and capture what the first step would otherwise wait for.

        Args:
            most_rows: generated tokens of a step, as many as sequences run at once.
            longest: tokens of the longest sequence.
        """
        ...


def uniform(seed: int, choice: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) with 53 random bits from (seed, choice, position, attempt): the same on every backend."""
    key = f"{seed}:{choice}:{position}:{attempt}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53
