"""How much background work a step may have beside interactive requests. No tensors.

Background requests (batch jobs) have all of a step when no other request is running or ready. Beside other requests'
decodes a step takes a limited number of their rows, each a decode or a prompt token: as many as keep the step's time
within TARGET, learned from the last steps.
"""

from __future__ import annotations

from collections import deque
from statistics import median

TARGET = 1.12
"""Time of a step with background rows, relative to one without; its noise comes on top."""
SAMPLES = 5  # steps without background rows whose median is the time of one
PROBE_EVERY = 24  # steps; one in so many is without background rows
MOST = 512  # rows
UP, DOWN, IDLE = 0.25, 0.8, 0.05
"""What a step changes of the rows: added when it was quick enough, multiplied when it was not, added without any."""


class BackgroundShare:
    """Rows of background work for the next step, learned from the steps that ran."""

    def __init__(self) -> None:
        self.limit = 1.0
        self._alone_ms: deque[float] = deque(maxlen=SAMPLES)
        self._num_decodes = 0  # of the steps in _alone_ms, within a quarter
        self._since_probe = 0

    def rows(self, num_decodes: int) -> int:
        """The most in a step with so many decodes of other requests."""
        if len(self._alone_ms) < SAMPLES or not self._like_the_known(num_decodes) or self._since_probe >= PROBE_EVERY:
            return 0
        return int(self.limit)

    def observe(self, num_decodes: int, rows: int, elapsed_ms: float) -> None:
        """Learn from a step with only these: so many decodes of other requests, and background rows."""
        if not rows:
            if not self._like_the_known(num_decodes):
                self._alone_ms.clear()
                self._num_decodes = num_decodes
            self._alone_ms.append(elapsed_ms)
            self._since_probe = 0
            self.limit = min(self.limit + IDLE, MOST) if self.limit < 1 else self.limit
        elif self._alone_ms and self._like_the_known(num_decodes):
            self._since_probe += 1
            quick = elapsed_ms <= TARGET * median(self._alone_ms)
            self.limit = min(self.limit + UP, MOST) if quick else self.limit * DOWN

    def _like_the_known(self, num_decodes: int) -> bool:
        return abs(num_decodes - self._num_decodes) <= self._num_decodes / 4
