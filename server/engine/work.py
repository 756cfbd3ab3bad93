"""What the sequences of one HTTP request have taken, for its line in the log and its trace."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from typing import Protocol

from server.engine.request import FinishedRequest, FinishReason


class Places(Protocol):
    """How many sequences a client may have with the engine at once."""

    @property
    def is_full(self) -> bool: ...
    async def take(self, *, may_wait: bool, deadline: float | None) -> None: ...
    def release(self) -> None: ...


class Work:
    """Sums over the sequences that have ended, and the first and last of their instants (on `time.monotonic`).

    The prompt of several choices counts once.
    """

    def __init__(self) -> None:
        self.places: Places | None = None  # of the client; None: without a limit
        self.reasons: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.max_tokens = 0  # of the longest that was allowed
        self.arrival: float | None = None
        self.admission: float | None = None
        self.first_token: float | None = None
        self.end: float | None = None

    def add(self, finished: FinishedRequest) -> None:
        """A sequence that has ended."""
        self.reasons[finished.reason.value] += 1
        if not finished.choice:
            self.prompt_tokens += finished.num_prompt_tokens
            self.cached_tokens += finished.num_cached_tokens
        self.completion_tokens += finished.num_generation_tokens
        self.max_tokens = max(self.max_tokens, finished.max_tokens)
        self.arrival = _first(self.arrival, finished.arrival)
        self.admission = _first(self.admission, finished.admission)
        self.first_token = _first(self.first_token, finished.first_token)
        self.end = max(self.end or 0.0, finished.end)

    def abort(self, sequences: int) -> None:
        """Sequences that were aborted; they report nothing more."""
        if sequences:
            self.reasons[FinishReason.ABORT.value] += sequences

    @property
    def sequences(self) -> int:
        return self.reasons.total()

    @property
    def intervals(self) -> dict[str, float]:
        """Seconds of `queue` (arrival to first step), `prefill` (to first token, or to the end of scoring) and `decode`
        (to the end of the last sequence), as far as it has come."""
        instants = (self.arrival, self.admission, self.first_token, self.end)
        found = {}
        for name, begin, end in zip(("queue", "prefill", "decode"), instants, instants[1:], strict=False):
            if begin is not None and end is not None:
                found[name] = end - begin
        return found


def _first(one: float | None, other: float | None) -> float | None:
    return min((instant for instant in (one, other) if instant is not None), default=None)


work_of_request: ContextVar[Work | None] = ContextVar("work_of_request", default=None)
"""Of the HTTP request that is being handled."""
