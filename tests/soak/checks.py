"""What must hold when a soak rests: each check says what it has found."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from tests.soak.broken import COMPLETIONS
from tests.soak.clients import ADMISSION, STREAMED_LINES, generated
from tests.soak.driver import LEFT, Driver, Handler
from tests.soak.machine import Prometheus, Reading, Samples, ServerProcess, total

PATIENCE = 60.0  # seconds until an idle server has given everything back
GAUGES = ("lpa:num_requests_running", "lpa:num_requests_waiting", "lpa:kv_cache_usage_perc")
BETWEEN = ("/metrics", "/ready")  # what Prometheus and the driver ask beside the clients
STARVED = 60.0  # seconds of the server's processor time in which a request of lines may stand still
POOLS = 8  # threads by which the server's pools, which are bounded, may have grown
SETTLED = 120.0  # seconds after which a server's memory must not grow; in a shorter soak half of its long load
MAX_GROWTH = 16 << 20  # bytes over what is measured after that
SOLO = 200  # sampled texts that are generated once more, alone


class Check(NamedTuple):
    """A name, whether it holds, and what was found."""

    name: str
    passed: bool
    found: str


async def until(condition: Callable[[], Awaitable[bool]]) -> bool:
    """Wait for it, PATIENCE seconds at most; whether it came true."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.5)
    return True


async def idle(server: ServerProcess, when: str) -> Check:
    """Nothing runs, nothing waits, no block is held."""
    page: Samples = {}

    async def all_zero() -> bool:
        nonlocal page
        page = await server.page()
        return not any(total(page, name) for name in GAUGES)

    passed = await until(all_zero)
    found = ", ".join(f"{name.removeprefix('lpa:')} {total(page, name):g}" for name in GAUGES)
    return Check(f"idle {when}", passed, found)


async def nothing_kept(server: ServerProcess, start: Reading, when: str) -> Check:
    """Descriptors and tasks are no more than at the start, threads but for those of pools."""
    most, now = start._replace(threads=start.threads + POOLS), start

    async def as_before() -> bool:
        nonlocal now
        now = await server.reading()
        return all(few <= many for few, many in zip(now, most, strict=True))

    passed = await until(as_before)
    found = ", ".join(f"{name} {getattr(start, name)} -> {getattr(now, name)}" for name in Reading._fields)
    return Check(f"descriptors, threads, tasks {when}", passed, found)


def memory(samples: Sequence[tuple[float, int]]) -> Check:
    """(seconds since the start, bytes) without slope, once SETTLED seconds have passed, or half of a shorter time."""
    settled = min(SETTLED, samples[-1][0] / 2)
    name = f"memory after {settled:.0f} s"
    late = [(at, size) for at, size in samples if at >= settled]
    if len(late) < 2:
        return Check(name, False, "the load was too short: a line needs two readings")
    seconds = late[-1][0] - late[0][0]
    growth = slope(late) * seconds
    text = (
        f"{growth / 1e6:+.1f} MB in {seconds:.0f} s by the fitted line, {MAX_GROWTH / 1e6:.0f} MB allowed; "
        f"{samples[0][1] / 1e6:.0f} MB at the start, {max(size for _, size in samples) / 1e6:.0f} MB at most"
    )
    return Check(name, growth <= MAX_GROWTH, text)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


# --- counts ----------------------------------------------------------------------------------------------------------


def differences(mine: Counter[Handler], theirs: Counter[Handler]) -> list[str]:
    """Where two counts of HTTP requests differ. A client that has left does not know its status: any."""
    unknown: Counter[tuple[str, str]] = Counter()
    for (route, method, status), count in mine.items():
        unknown[route, method] += count * (status == LEFT)
    ours, others = _joined(mine), _joined(theirs)
    wrong = []
    for key in sorted(ours | others):
        more = others[key] - ours[key]
        if 0 <= more <= unknown[key[:2]]:
            unknown[key[:2]] -= more
        else:
            wrong.append(f"{' '.join(key)}: {ours[key]} sent, {others[key]} counted")
    wrong += [f"{' '.join(key)}: {count} requests are not counted" for key, count in unknown.items() if count]
    return wrong


def _joined(counts: Counter[Handler]) -> Counter[Handler]:
    """Without those between loads. 200 and 499 are one: a cancelled stream began as a 200."""
    found: Counter[Handler] = Counter()
    for (route, method, status), count in counts.items():
        if route not in BETWEEN and status != LEFT:
            found[route, method, "200 or 499" if status in ("200", "499") else status] += count
    return found


def counted(series: Sequence[tuple[dict[str, str], float]]) -> Counter[Handler]:
    """HTTP requests as the server or Prometheus has counted them."""
    found: Counter[Handler] = Counter()
    for labels, value in series:
        found[labels["handler"], labels["method"], labels["status"]] += int(value)
    return found


def _counts(name: str, driver: Driver, theirs: Counter[Handler], tokens: float) -> Check:
    wrong = differences(driver.answers, theirs)
    failed = {key: count for key, count in theirs.items() if key[2].startswith("5")}
    least, most = driver.generated, driver.generated + driver.generated_at_most
    if not least <= tokens <= most:
        wrong.append(f"{tokens:g} tokens are no number from {least} to {most}")
    wrong += [f"{count} x {' '.join(key)}" for key, count in failed.items()]
    sent = driver.answers.total()
    text = f"{sent} HTTP requests, {tokens:.0f} tokens generated, of which clients have read {least}; no 5xx"
    return Check(name, not wrong, "; ".join(wrong) or text)


async def counts(driver: Driver, prometheus: Prometheus | None, when: str) -> list[Check]:
    """The server's counts, and what Prometheus has of them, are the driver's own."""
    page: Samples = await driver.server.page()
    of_page = counted(page["lpa:http_requests_total"])
    found = [_counts(f"counts at /metrics {when}", driver, of_page, total(page, "lpa:generation_tokens_total"))]
    if prometheus is not None:
        await prometheus.scraped_since(time.time())
        of_queries = counted(await prometheus.query("lpa:http_requests_total"))
        ((_, tokens),) = await prometheus.query("sum(lpa:generation_tokens_total)")
        found.append(_counts(f"counts in Prometheus {when}", driver, of_queries, tokens))
    return found


async def hard_enough(server: ServerProcess, driver: Driver) -> Check:
    """The soak has had the queue overflow, and the cache preempt."""
    preempted = total(await server.page(), "lpa:num_preemptions_total")
    refused = sum(count for (_, _, status), count in driver.answers.items() if status == "429")
    text = f"{refused} requests met a full queue, {preempted:.0f} sequences were preempted"
    return Check("hard enough", bool(preempted and refused), text)


async def lives_in_prometheus(prometheus: Prometheus, seconds: float) -> Check:
    """Prometheus has seen both restarts."""
    span = f"[{int(seconds) + 60}s]"
    restarts = sum(value for _, value in await prometheus.query(f"changes(process_start_time_seconds{span})"))
    up = sum(value for _, value in await prometheus.query(f"count_over_time(up{span})"))
    return Check("restarts in Prometheus", restarts == 2, f"{restarts:.0f} restarts in {up:.0f} scrapes")


# --- what came of it -------------------------------------------------------------------------------------------------


def behaviour(driver: Driver) -> list[Check]:
    """No fault, nothing that hung, no scoring that starved."""
    still = max(driver.longest.get(f"{name}, of processor time", 0.0) for name in (STREAMED_LINES, ADMISSION))
    return [
        Check("no fault", not driver.faults, "\n".join(driver.faults[:20]) or "none"),
        Check("no hung request", not driver.hung, "\n".join(driver.hung[:20]) or "none"),
        Check(
            "scoring does not starve", still <= STARVED, f"{still:.1f} s of processor time at most, {STARVED:g} allowed"
        ),
    ]


def log(server: ServerProcess) -> Check:
    """The server has logged no error."""
    errors = server.errors()
    return Check("no error in the log", not errors, "\n".join(errors[:10]) or "none")


async def alone(driver: Driver) -> Check:
    """Sampled texts and their log-probabilities are those of a run without other requests, to the bit."""
    rng = random.Random(driver.seed)
    chosen = rng.sample(driver.sampled, min(SOLO, len(driver.sampled)))
    wrong = []
    for body, expected in chosen:
        again = generated(await driver.post(COMPLETIONS, body))
        if again != expected:
            wrong.append(f"{body}: {expected[0]!r} was {again[0]!r} alone")
    text = f"{len(chosen) - len(wrong)} of {len(chosen)} texts are equal"
    return Check("sampled texts equal their solo runs", not wrong and bool(chosen), "\n".join([text, *wrong[:5]]))
