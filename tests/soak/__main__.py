"""The course of a soak. A first load warms the server up; what it then holds is what it may hold later. A long load
follows, and a rest in which everything is looked at. Then comes load during which the server gets a SIGTERM, is
started, gets a SIGKILL, and is started once more; and a last rest.

    python -m tests.soak --seconds 600 --dtype float32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.soak import checks
from tests.soak.checks import Check
from tests.soak.clients import KINDS, batch_lines, check_batch, finished_batch, start_batch
from tests.soak.driver import Driver
from tests.soak.machine import DRAIN_SECONDS, Prometheus, ServerProcess
from tests.soak.report import as_json, print_report

WARM_UP, LONG, SHORT = 0.05, 0.65, 0.1  # shares of the time; there are three short loads
MOST_WARM_UP = 30.0  # seconds
DURABLE = 60  # lines of the batch that outlives two processes


def main(words: Sequence[str] | None = None) -> int:
    names = [kind.name for kind in KINDS]
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Every kind of client at one server.")
    parser.add_argument("--seconds", type=float, default=600, help="of load; rests and starts come on top")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the server")
    parser.add_argument("--seed", type=int, default=0, help="what clients do follows from it")
    parser.add_argument("--only", action="append", choices=names, help="these clients alone; may be repeated")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--keep", type=Path, help="folder for logs and batches (default: one that is removed)")
    options = parser.parse_args(words)
    kinds = [kind for kind in KINDS if not options.only or kind.name in options.only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        driver = Driver(ServerProcess(folder, options.dtype), kinds, options.seed)
        found = asyncio.run(soak(driver, folder, options.seconds))
    print_report(driver, found)
    settings = {"seconds": options.seconds, "dtype": options.dtype, "seed": options.seed}
    if options.output is not None:
        options.output.write_text(json.dumps(as_json(driver, found, settings), indent=1) + "\n")
    return 0 if all(check.passed for check in found) else 1


async def soak(driver: Driver, folder: Path, seconds: float) -> list[Check]:
    """Run it, and look at what comes of it."""
    server = driver.server
    prometheus = Prometheus(folder, server.url.removeprefix("http://")) if Prometheus.is_installed() else None
    if prometheus is None:
        say("prometheus is not installed: its counts are not compared (apt-get install prometheus)")
    began = time.monotonic()
    try:
        await server.start()
        driver.server_is_up()
        if prometheus is not None:
            await prometheus.start()
        found = await _loads_and_rests(driver, prometheus, seconds)
        if prometheus is not None:
            found.append(await checks.lives_in_prometheus(prometheus, time.monotonic() - began))
        say("the end")
        status = await server.end(signal.SIGTERM, 30)
        found.append(Check("SIGTERM of an idle server", status == 0, f"exit status {status}"))
    finally:
        server.close()
        if prometheus is not None:
            prometheus.close()
    return [*checks.behaviour(driver), *found, checks.log(server)]


async def _loads_and_rests(driver: Driver, prometheus: Prometheus | None, seconds: float) -> list[Check]:
    server, found = driver.server, Found()
    async with _memory_of(driver):
        say("warming up")
        async with driver.load():
            await asyncio.sleep(min(MOST_WARM_UP, WARM_UP * seconds))
        found.append(await checks.idle(server, "after the warm-up"))
        reading = await server.reading()
        say(f"a long load; the server holds {reading}")
        async with driver.load():
            await asyncio.sleep(LONG * seconds)
            say("no new requests")
    found.append(await checks.idle(server, "after the long load"))
    found.append(await checks.nothing_kept(server, reading, "after the long load"))
    found.extend(await checks.counts(driver, prometheus, "after the long load"))
    found.append(await checks.hard_enough(server, driver))
    found.append(checks.memory(driver.memory))

    async with driver.load():
        requests = batch_lines(random.Random(driver.seed), DURABLE)
        batch = await start_batch(driver, requests)
        await asyncio.sleep(SHORT * seconds)
        say("SIGTERM under load")
        driver.server_ends("drain")
        signalled = time.monotonic()
        status = await server.end(signal.SIGTERM, DRAIN_SECONDS + 30)
        took = time.monotonic() - signalled
        found.append(Check("SIGTERM under load", status == 0, f"exit status {status} after {took:.1f} s"))
        await _restart(driver)
        await asyncio.sleep(SHORT * seconds)
        say("SIGKILL under load")
        driver.server_ends("kill")
        await server.end(signal.SIGKILL, 30)
        await _restart(driver)
        await asyncio.sleep(SHORT * seconds)
        say("no new requests")
    found.append(await _batches_end(driver, batch, requests))
    found.append(await checks.idle(server, "at the end"))
    found.append(await checks.nothing_kept(server, reading, "at the end"))
    found.extend(await checks.counts(driver, prometheus, "at the end"))
    say("sampled texts alone")
    async with driver.requests():
        found.append(await checks.alone(driver))
    return found


class Found(list[Check]):
    """Checks, each printed as it is added."""

    def append(self, check: Check) -> None:
        say(f"{'holds' if check.passed else 'FAILS'}: {check.name}: {check.found}")
        super().append(check)

    def extend(self, checks: Iterable[Check]) -> None:
        for check in checks:
            self.append(check)


async def _restart(driver: Driver) -> None:
    await driver.server.start()
    driver.reset_counts()
    driver.server_is_up()


async def _batches_end(driver: Driver, batch_id: str, requests: list[dict[str, object]]) -> Check:
    """The batch that two processes have worked at has every line once, and no other is left unfinished."""
    say("batches")
    name = "batches outlive SIGTERM and SIGKILL"
    async with driver.requests():
        await check_batch(driver, await finished_batch(driver, batch_id), requests)
        others = (await driver.get("/v1/batches?limit=100"))["data"]
        ends = [(await finished_batch(driver, other["id"]))["status"] for other in others]
        driver.generated_at_most += 1 << 40  # tokens of lines begun before the last start: their number is unknown
    passed = set(ends) <= {"completed", "cancelled"}
    return Check(name, passed, f"{DURABLE} lines once each; {len(ends)} batches are {', '.join(sorted(set(ends)))}")


@asynccontextmanager
async def _memory_of(driver: Driver) -> AsyncIterator[None]:
    """The server's memory is noted every second."""
    start = time.monotonic()

    async def watch() -> None:
        while True:
            driver.memory.append((time.monotonic() - start, driver.server.resident()))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
