"""The processes of a soak, the server and Prometheus, and what the kernel says of the server's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import free_port

ADMIN_KEY = "the operator's"
START_SECONDS = 120  # of a process
DRAIN_SECONDS = 180  # the server's drain_timeout
SLOTS, QUEUE = 16, 32  # sequences that run, and that wait
CACHE = 10 << 20  # bytes: about as many tokens as the longest prompt and a third more; with bfloat16 twice as many

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Of a page of metrics: (labels, value) by the name of a sample."""


class Reading(NamedTuple):
    """What an idle server holds."""

    descriptors: int
    threads: int
    tasks: int


class ServerProcess:
    """`lpa serve` on one port over one folder of batches, one process after another."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._dtype = dtype
        self._process: subprocess.Popen[bytes] | None = None
        self.logs: list[Path] = []

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start a process and wait until it takes requests."""
        flags = {
            "port": self.port,
            "dtype": self._dtype,
            "max-num-seqs": SLOTS,
            "max-queue": QUEUE,
            "kv-cache-memory": CACHE,
            "data-dir": self._folder / "data",
            "admin-api-key": ADMIN_KEY,
            "log-format": "json",
            "drain-timeout": DRAIN_SECONDS,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        self.logs.append(self._folder / f"server-{len(self.logs) + 1}.log")
        with self.logs[-1].open("w") as log:
            command = [sys.executable, "-m", "server.cli", "serve", *words]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_SECONDS):
            while not await _is_ok(session, f"{self.url}/ready"):
                if self._process.poll() is not None:
                    raise RuntimeError(f"the server has ended: {self.logs[-1].read_text()[-2000:]}")
                await asyncio.sleep(0.1)

    async def end(self, number: signal.Signals, seconds: float) -> int | None:
        """Send a signal and wait; the exit status, or None where the process had to be killed after all."""
        assert self._process is not None
        process = self._process
        process.send_signal(number)
        try:
            return await asyncio.to_thread(process.wait, seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def close(self) -> None:
        """End a process that still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    async def page(self) -> Samples:
        """What /metrics says."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            return samples(await answer.text())

    async def reading(self) -> Reading:
        tasks = total(await self.page(), "lpa:event_loop_tasks")
        folder = Path(f"/proc/{self.pid}")
        return Reading(len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), int(tasks))

    def resident(self) -> int:
        """Bytes of memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor_seconds(self) -> float:
        """What the process has computed; a busy machine takes longer for it, not more."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def errors(self) -> list[str]:
        """Lines of the logs that say that something has failed, and those that are no log lines."""
        found = []
        for path in self.logs:
            for text in path.read_text(errors="replace").splitlines():
                try:
                    bad = json.loads(text)["level"] in ("ERROR", "CRITICAL", "error", "critical")
                except (ValueError, KeyError):
                    bad = True
                if bad:
                    found.append(f"{path.name}: {text[:2000]}")
        return found


def samples(page: str) -> Samples:
    """A page of metrics in Prometheus' text format."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(page: Samples, name: str) -> float:
    """The sum over a sample's series; 0 if there is none."""
    return sum(value for _, value in page.get(name, ()))


class Prometheus:
    """Debian's prometheus, which scrapes the server every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        self._target = target
        self._url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("prometheus") is not None

    async def start(self) -> None:
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "lpa", "static_configs": [{"targets": [self._target]}]}],
        }
        path = self._folder / "prometheus.yml"
        path.write_text(json.dumps(config))  # which is YAML
        program = shutil.which("prometheus")
        assert program is not None
        flags = {
            "config.file": path,
            "storage.tsdb.path": self._folder / "prometheus",
            "web.listen-address": self._url.removeprefix("http://"),
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        with (self._folder / "prometheus.log").open("w") as log:
            self._process = subprocess.Popen([program, *words], stdout=log, stderr=log)
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_SECONDS):
            while not await _is_ok(session, f"{self._url}/-/ready"):
                await asyncio.sleep(0.1)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    async def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of the series that a query finds."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self._url}/api/v1/query", params={"query": expression}) as response,
        ):
            answer: dict[str, Any] = await response.json()
        if answer["status"] != "success":
            raise RuntimeError(f"{expression}: {answer}")
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    async def scraped_since(self, when: float) -> None:
        """Wait for a scrape that began after a time, in seconds since 1970."""
        async with asyncio.timeout(START_SECONDS):
            while not any(at > when for _, at in await self.query("timestamp(lpa:num_requests_running)")):
                await asyncio.sleep(0.2)


async def _is_ok(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False
