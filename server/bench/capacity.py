"""How many requests machines carry at which latency, by formula from the step times of `lpa bench step`.

The formula and its assumptions are on the page Capacity of the documents. No tensors, and nothing is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_REPLICAS = 1 << 13
MOST_REFUSED = 1e-3  # share of the requests


@dataclass(frozen=True)
class Workload:
    """What every request is like, in tokens, and how many of them run and wait at once on a machine."""

    input_len: int
    output_len: int
    slots: int
    max_queue: int


@dataclass(frozen=True)
class Steps:
    """Measured times: a step's by the number of sequences that decode, ascending, and a prompt's by its tokens."""

    layout: str
    batches: tuple[int, ...]
    decode_ms: tuple[float, ...]
    context: int  # tokens before each of these steps
    prompt_ms: float  # of each token
    prompt_len: int  # of the prompt that this was measured on

    def step_ms(self, running: float) -> float:
        """Of so many sequences; between two measured batches on the line between them."""
        return float(np.interp(running, self.batches, self.decode_ms))


def read_steps(path: Path, layout: str | None, input_len: int, output_len: int) -> Steps:
    """What `lpa bench step --json` has written, at the lengths nearest to those of the workload.

    Raises:
        ValueError: the file is no such one, or has several layouts and none is named.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        layouts = sorted({row["layout"] for row in rows})
        if layout is None and len(layouts) != 1:
            raise ValueError(f"layout: {path} has {', '.join(layouts)}; name one")
        rows = [row for row in rows if layout in (None, row["layout"])]
        decodes = [row for row in rows if row["kind"] == "decode"]
        prefills = [row for row in rows if row["kind"] == "prefill"]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{path}: not what `lpa bench step --json` writes") from None
    if not decodes or not prefills:
        raise ValueError(f"{path}: has no decode and prefill of {layout or 'any layout'}")
    mean = input_len + output_len / 2
    context = min((row["context"] for row in decodes), key=lambda found: abs(found - mean))
    steps = sorted((row["batch"], row["ms"]) for row in decodes if row["context"] == context)
    prompt = min(prefills, key=lambda row: (abs(row["context"] - input_len), row["batch"]))
    return Steps(
        layout=decodes[0]["layout"],
        batches=tuple(batch for batch, _ in steps),
        decode_ms=tuple(ms for _, ms in steps),
        context=context,
        prompt_ms=prompt["ms"] / (prompt["batch"] * prompt["context"]),
        prompt_len=prompt["context"],
    )


def at_concurrency(steps: Steps, workload: Workload, running: int) -> dict[str, float]:
    """Of a machine on which so many sequences always run: what each sees, and what all get."""
    prompt = steps.prompt_ms * workload.input_len
    # while a sequence makes its tokens, each of those beside it ends once, and the next one brings a prompt
    request = workload.output_len * steps.step_ms(running) + running * prompt
    rate = 1e3 * running / request
    return {
        "running": running,
        "inter_token_ms": (request - prompt) / workload.output_len,
        "request_s": request / 1e3,
        "requests_per_s": rate,
        "output_tokens_per_s": rate * workload.output_len,
    }


def at_rate(steps: Steps, workload: Workload, rate: float) -> dict[str, float]:
    """Of a machine to which requests come at random, `rate` a second on average: a queue whose server works at the
    rate of as many sequences as are there."""
    slots, places = workload.slots, workload.slots + workload.max_queue
    speeds = np.array([at_concurrency(steps, workload, n)["requests_per_s"] for n in range(1, slots + 1)])
    numbers = np.arange(places + 1)
    ends = speeds[np.minimum(numbers[1:], slots) - 1]
    logs = np.concatenate([[0.0], np.cumsum(np.log(rate) - np.log(ends))])  # of the probabilities, up to a constant
    shares = np.exp(logs - logs.max())
    shares /= shares.sum()
    taken = rate * (1 - shares[-1])
    running = float(shares @ np.minimum(numbers, slots))
    waiting = float(shares @ np.maximum(numbers - slots, 0))
    return {
        "requests_per_s": rate,
        "utilisation": rate / float(speeds.max()),
        "running": running,
        "wait_s": waiting / taken,  # by Little's law, as the next one
        "inter_token_ms": (1e3 * running / taken - steps.prompt_ms * workload.input_len) / workload.output_len,
        "request_s": (running + waiting) / taken,
        "refused": float(shares[-1]),
    }


def replicas(steps: Steps, workload: Workload, rate: float, inter_token_ms: float, wait_s: float) -> dict[str, float]:
    """The fewest machines that carry `rate` requests a second within both limits, and what one of them then sees.

    Raises:
        ValueError: a machine with one sequence alone is slower, or it would take more than MOST_REPLICAS.
    """
    alone = at_concurrency(steps, workload, 1)["inter_token_ms"]
    if alone > inter_token_ms:
        raise ValueError(f"inter-token-ms: a sequence alone takes {alone:.3g} ms a token")

    def fits(count: int) -> bool:
        found = at_rate(steps, workload, rate / count)
        within = found["inter_token_ms"] <= inter_token_ms and found["wait_s"] <= wait_s
        return within and found["refused"] <= MOST_REFUSED

    low, high = 0, 1  # what does not fit, and what does
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_REPLICAS:
            raise ValueError(f"rate: {rate:g} requests a second take more than {MOST_REPLICAS} machines")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return {"rate": rate, "replicas": high, **at_rate(steps, workload, rate / high)}


def bench_capacity(
    steps: Steps,
    workload: Workload,
    rates: Sequence[float],
    *,
    inter_token_ms: float,
    wait_s: float,
    price_per_hour: float | None,
) -> dict[str, Any]:
    """The report: one machine by concurrency, and for each rate the machines that it takes, with their cost in the
    unit of the price.

    Raises:
        ValueError: more slots than the largest batch that was measured, or as `replicas`.
    """
    if workload.slots > steps.batches[-1]:
        raise ValueError(f"slots: {workload.slots} are more than the {steps.batches[-1]} sequences that were measured")
    counts = sorted({1, *(batch for batch in steps.batches if batch <= workload.slots), workload.slots})
    fleet = [replicas(steps, workload, rate, inter_token_ms, wait_s) for rate in rates]
    if price_per_hour is not None:
        for found in fleet:
            found["cost_per_hour"] = found["replicas"] * price_per_hour
            tokens = 3600 * found["rate"] * workload.output_len
            found["cost_per_million_tokens"] = 1e6 * found["cost_per_hour"] / tokens
    return {
        "layout": steps.layout,
        "context": steps.context,
        "prompt_len": steps.prompt_len,
        "machine": [at_concurrency(steps, workload, count) for count in counts],
        "replicas": fleet,
    }


def print_capacity(report: dict[str, Any]) -> None:
    """Two tables: a machine by concurrency, and machines by rate."""
    from rich.table import Table

    from server.bench.report import stdout_console

    console = stdout_console()
    machine = Table(title=f"One machine, {report['layout']} cache, steps after {report['context']} tokens")
    for name in ("running", "inter-token ms", "request s", "requests/s", "output tokens/s"):
        machine.add_column(name, justify="right")
    for row in report["machine"]:
        machine.add_row(f"{row['running']:.0f}", *(f"{row[name]:,.4g}" for name in list(row)[1:]))
    console.print(machine)
    if not report["replicas"]:
        return
    priced = "cost_per_hour" in report["replicas"][0]
    fleet = Table(title="Machines for a rate")
    names = ["requests/s", "machines", "utilisation", "running each", "inter-token ms", "wait s", "request s"]
    for name in [*names, *(["cost an hour", "cost a million output tokens"] if priced else [])]:
        fleet.add_column(name, justify="right")
    for row in report["replicas"]:
        cells = [f"{row['rate']:g}", str(row["replicas"]), f"{100 * row['utilisation']:.0f} %"]
        cells += [f"{row[name]:,.3g}" for name in ("running", "inter_token_ms", "wait_s", "request_s")]
        cells += [f"{row[name]:,.4g}" for name in ("cost_per_hour", "cost_per_million_tokens") if priced]
        fleet.add_row(*cells)
    console.print(fleet)


def rates_to_plot(steps: Steps, workload: Workload, points: int = 60) -> list[dict[str, float]]:
    """What one machine sees from a tenth of what it carries up to a little less than all."""
    most = max(at_concurrency(steps, workload, n)["requests_per_s"] for n in range(1, workload.slots + 1))
    return [at_rate(steps, workload, share * most) for share in np.linspace(0.1, 0.98, points)]
