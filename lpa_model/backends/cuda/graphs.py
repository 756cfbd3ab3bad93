"""Functions captured as CUDA graphs, one for each bucket of rows, and replayed by one launch.

On a CPU a graph is the function itself: the same code runs, without what a GPU gains by it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lpa_model.backends import features

FIRST = (1, 2, 4, 8, 16, 24, 32)
MOST_SECONDS = 60.0
MOST_BYTES = 1 << 30  # of device memory that graphs may take

Run = Callable[[], None]


def buckets(most: int) -> list[int]:
    """Numbers of rows that are captured: few steps apart, so that at most half of a small step is padding and a third
    of a large one; `most` is the last."""
    sizes = [*FIRST, *range(48, min(most, 128) + 1, 16), *range(160, most + 1, 32)]
    return [size for size in sizes if size < most] + [most]


@dataclass
class Graphs:
    """By number of rows: what replays the function that was captured with so many."""

    replays: dict[int, Run] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)  # and why
    seconds: float = 0.0
    bytes: int = 0  # of the device's memory

    def bucket(self, rows: int) -> int | None:
        """The smallest one that takes so many rows."""
        return min((size for size in self.replays if size >= rows), default=None)

    def replay(self, size: int) -> None:
        """Launch it. Its inputs are read, and its outputs written, where they were when it was captured."""
        self.replays[size]()


def capture(
    runs: Mapping[int, Sequence[Run]],
    device: torch.device,
    most_seconds: float = MOST_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> list[Graphs]:
    """Capture functions by number of rows, the largest first, until time or memory is used up.

    Each runs once before, which compiles its kernels. A function must not wait for the device and must keep its inputs
    and outputs in tensors of its own: all graphs share one pool for what is between.

    Args:
        runs: by number of rows, as many functions for each; a bucket is captured whole or not at all.

    Returns:
        One `Graphs` for each function of a bucket.
    """
    found = [Graphs() for _ in next(iter(runs.values()), ())]
    capturing = _Capture(device)
    began, free = time.monotonic(), features.free_memory(device)
    spent = taken = 0.0
    freezes = not gc.get_freeze_count()  # a server has done it, for good
    if freezes:
        gc.collect()
        gc.freeze()  # each capture collects garbage, which is quick among few objects
    try:
        for size, functions in sorted(runs.items(), reverse=True):
            reason = capturing.failure
            if spent > most_seconds:
                reason = f"the others took {spent:.0f} of {most_seconds:.0f} seconds"
            elif taken > most_bytes:
                reason = f"the others took {taken / 2**20:.0f} of {most_bytes / 2**20:.0f} MiB"
            replays = None if reason else capturing(functions)
            for graphs, number in zip(found, range(len(functions)), strict=True):
                if replays is None:
                    graphs.left_out[size] = reason or capturing.failure or ""
                else:
                    graphs.replays[size] = replays[number]
            spent = time.monotonic() - began
            taken = max(0, free - features.free_memory(device)) if device.type == "cuda" else 0
    finally:
        if freezes:
            gc.unfreeze()
    for graphs in found:
        graphs.seconds, graphs.bytes = spent, int(taken)
    return found


class _Capture:
    """From functions to what replays them, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.failure = device, ""
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, functions: Sequence[Run]) -> list[Run] | None:
        """None if torch could not capture one, for the reason that `failure` has then."""
        if self.device.type != "cuda":
            for function in functions:
                function()
            return list(functions)
        replays: list[Run] = []
        for function in functions:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                function()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads may use the device meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    function()
            except RuntimeError as error:
                self.failure = f"a capture failed: {error}"
                return None
            replays.append(graph.replay)
        return replays
