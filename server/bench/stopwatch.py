"""How long calls take in all, measured from outside: the code that is timed does not know."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Inside the context `owner.name` (an object's or a class's) is `call`."""
    own = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


class Stopwatch:
    """Seconds and calls by label; `clear` starts anew."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    @contextmanager
    def watch(self, owner: Any, name: str, label: str) -> Iterator[None]:
        """Time every call of `owner.name` (an object's or a class's) inside the context."""
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **keys: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **keys)
            finally:
                self.seconds[label] += time.perf_counter() - started
                self.calls[label] += 1

        with replaced(owner, name, timed):
            yield
