"""What the HTTP benchmarks show: a bar while they run, then a table or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.bench.load import Timing
from server.bench.rounds import Target, Workload, measure, medians, ratios


def run_rounds(targets: Sequence[Target], workload: Workload) -> tuple[dict[str, Any], list[list[Timing]]]:
    """Measure with a live bar on stderr; returns the report: each server's rounds and medians, and their ratios; and
    for each server the timings of the requests that count and succeeded.

    Raises:
        OSError, RequestFailed, ValueError: as `measure`; and ValueError when all of a server's requests failed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = workload.load.requests * (workload.rounds + 1) * len(targets)
    timings: dict[int, list[Timing]] = {id(target): [] for target in targets}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def on_done(timing: Timing, target: Target) -> None:
            timings[id(target)].append(timing)
            failed = f", {len(target.errors)} errors" if target.errors else ""
            text = f"{target.client.url} round {len(target.rounds) + 1}: last {timing.total:.2f} s{failed}"
            progress.update(task, advance=1, description=text)

        measure(targets, workload, on_done)
    for target in targets:
        if not any(summary["input_tokens"] for summary in target.rounds):
            raise ValueError(f"{target.client.url}: every request failed: {target.errors[0]}")
    servers = [
        {
            "url": target.client.url,
            "model": target.model,
            "median": medians(target.rounds),
            "rounds": target.rounds,
            "errors": target.errors[:10],
        }
        for target in targets
    ]
    report: dict[str, Any] = {"servers": servers}
    if len(targets) == 2:
        report["ratio"] = ratios(targets[0].rounds, targets[1].rounds)
    counted = [of_target[workload.load.requests :] for of_target in timings.values()]  # after the first round
    return report, [[timing for timing in of_target if timing.error is None] for of_target in counted]


def print_report(report: dict[str, Any], title: str) -> None:
    """The medians over the rounds side by side, with the ratio and its spread."""
    servers = report["servers"]
    table = Table(title=title)
    table.add_column("median of the rounds", no_wrap=True)
    for server in servers:
        table.add_column(server["url"], justify="right", overflow="fold")
    if "ratio" in report:
        table.add_column("ratio (lowest to highest)", justify="right")
    for name, label in (
        ("output_tokens_per_s", "output tokens/s"),
        ("input_tokens_per_s", "input tokens/s"),
        ("ttft_ms", "time to first token, ms"),
        ("inter_token_ms", "inter-token latency, ms"),
        ("e2e_ms", "end to end, ms"),
        ("mean_nll", "mean NLL, nats per token"),
        ("errors", "errors per round"),
    ):
        values = [server["median"].get(name) for server in servers]
        if not any(values) and name != "errors":
            continue
        row = [label, *(_cell(value) for value in values)]
        if "ratio" in report:
            ratio = report["ratio"].get(name)
            row.append("" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        table.add_row(*row)
    stdout_console().print(table)
    for server in servers:
        for error in server["errors"][:1]:
            Console(stderr=True).print(f"{server['url']}: {error}", highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{_ms(value['median'])} (p90 {_ms(value['p90'])}, p99 {_ms(value['p99'])})"
    return f"{value:,.4f}" if value < 100 else f"{value:,.1f}"


def _ms(value: float) -> str:
    """A decimal, or two digits that count where that would be one or none."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def stdout_console() -> Console:
    """Standard output; wide enough for a table where it is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console
