"""What a GPU computes and how fast, part by part, each within its time: checks first, then measurements.

A process of its own runs the parts, since a fault of a kernel spoils the device for the process that it happened in:
after a failure the next part begins in a new one. The report is written after each part.
On a CPU the same parts run, tiny, with the kernels' twins: that tests these files, and measures nothing of a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from server.bench.device.checks import contract, invariance, operations, seeded
from server.bench.device.engine_runs import give_back_memory
from server.bench.device.setup import Setup
from server.bench.device.speed import (
    ahead,
    attention,
    billion,
    environment,
    http,
    layouts,
    prefill,
    start,
    steps,
    transformers_generate,
)

LEAST_SECONDS = 5.0  # a part is not begun with less


@dataclass(frozen=True)
class Part:
    """One entry of the report; `limit` in seconds, on a GPU and with full sizes."""

    run: Callable[[Setup], dict[str, Any]]
    limit: float


PARTS: dict[str, Part] = {
    "environment": Part(environment, 60),
    "operations": Part(operations, 120),
    "contract": Part(contract, 90),
    "invariance": Part(invariance, 60),
    "start": Part(start, 60),
    "steps": Part(steps, 150),
    "ahead": Part(ahead, 90),
    "http": Part(http, 90),
    "attention": Part(attention, 60),
    "billion": Part(billion, 60),
    "layouts": Part(layouts, 60),
    "prefill": Part(prefill, 45),
    "seeded": Part(seeded, 60),
    "transformers": Part(transformers_generate, 90),
}
"""In the order in which they run."""


def bench_device(
    setup: Setup,
    names: Sequence[str],
    minutes: float,
    out: Path | None,
    on_part: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
) -> dict[str, dict[str, Any]]:
    """Run the parts in their order; what each found, or why it found nothing (`error` or `left_out`).

    Args:
        setup: device and sizes.
        names: of PARTS.
        minutes: for all of them together.
        out: where the report is written, after each part.
        on_part: told of each as it is done.
    """
    until = time.monotonic() + 60 * minutes
    report: dict[str, dict[str, Any]] = {}
    worker = _Worker(setup)
    try:
        for name, part in PARTS.items():
            left = until - time.monotonic()
            if name not in names:
                report[name] = {"left_out": "it was not named"}
            elif left < LEAST_SECONDS:
                report[name] = {"left_out": f"the {minutes:g} minutes were used up"}
            else:
                began = time.monotonic()
                report[name] = worker.run(name, left if setup.tiny else min(part.limit, left))
                report[name]["seconds_taken"] = time.monotonic() - began
            if out is not None:
                out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if name in names:
                on_part(name, report[name])
    finally:
        worker.end()
    return report


class _Worker:
    """A process that runs parts, and a new one after a failure."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        if self._process is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._setup))
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            self._pipe.send(name)
            if self._pipe.poll(seconds):
                found: dict[str, Any] = self._pipe.recv()
            else:
                found = {"error": f"it took longer than {seconds:.0f} seconds"}
        except (EOFError, OSError):
            self._process.join(5)
            found = {"error": f"its process ended with {self._process.exitcode}"}
        if "error" in found:
            self.end()
        return found

    def end(self) -> None:
        if self._process is not None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, too
            self._process.kill()  # before it has a group
            self._process.join()
        self._process = None


def _work(pipe: Connection, setup: Setup) -> None:
    """The process: names of parts in, what they found out."""
    os.setpgid(0, 0)
    if setup.tiny and setup.place.type == "cpu":
        torch.set_num_threads(1)  # products this small lose by more
    os.environ["LPA_CUDA"] = "1" if setup.place.type == "cuda" else "twins"
    torch.set_grad_enabled(False)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            # in a thread of its own, as the engine's is
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_run, PARTS[name].run, setup).result()
        except Exception:
            found = {"error": traceback.format_exc(limit=-6)}
        give_back_memory(setup)
        pipe.send(found)


@torch.no_grad()
def _run(part: Callable[[Setup], dict[str, Any]], setup: Setup) -> dict[str, Any]:
    return part(setup)
