"""Versions of one model side by side: what each loses in quality, and what it gains in speed and bytes.

The first model is the one that the others are compared with, such as the dense one they were made from. Quality comes
from the engine that serves; speeds are of steps without HTTP, the models by turns in every round.
"""

from __future__ import annotations

import csv
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lpa_model.cache import bytes_per_token
from lpa_model.checkpoint import load_config
from server.bench.sampling import step_time
from server.engine.engine import Engine, build_engine
from server.engine.request import Request, SamplingParams
from server.llm import LLM
from server.settings import load_settings

WARM_STEPS = 8  # more than a measurement takes beyond its steps


@dataclass(frozen=True)
class Pair:
    """A sentence, and one that is wrong in a single place."""

    phenomenon: str
    good: str
    bad: str


def read_pairs(path: Path) -> list[Pair]:
    """Minimal pairs from a file of tab-separated values with the columns phenomenon, good and bad.

    Raises:
        ValueError: a column is missing or there is no pair; the message names the file.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := {"phenomenon", "good", "bad"} - set(rows.fieldnames or ()):
            raise ValueError(f"{path}: has no column {min(missing)!r}")
        found = [Pair(row["phenomenon"], row["good"] or "", row["bad"] or "") for row in rows]
    if not found or not all(pair.good and pair.bad for pair in found):
        raise ValueError(f"{path}: needs a good and a bad sentence in every line, and one line at least")
    return found


def bench_models(
    folders: Sequence[Path],
    texts: dict[str, str],
    pairs: Sequence[Pair],
    *,
    tokens: int,
    max_length: int | None,
    streams: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    options: dict[str, Any],
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """A row for each model folder, in order.

    Args:
        texts: by name; perplexity is of the first `tokens` tokens of each, in windows of `max_length` that do not
            overlap.
        pairs: the share in which the good sentence is the more probable one is the accuracy.
        streams: numbers of sequences that decode at once, after `context` tokens each.
        options: `dtype`, `weights` and `threads`, as `Settings` has them; None for a default.
        progress: told what is being measured.

    Raises:
        CheckpointError, UserError, ValueError: a folder, text or option cannot be used.
    """
    rows = []
    for folder in folders:
        progress(f"{folder}: quality")
        facts: dict[str, Any] = {"model": str(folder), "parameters": load_config(folder).parameter_count()}
        rows.append(facts | _quality(folder, texts, pairs, tokens, max_length, options))
    for row in rows:
        _compare(row, rows[0])
    for row in rows:
        for text in row["texts"].values():
            del text["logprobs"]
    speeds = _speeds(folders, streams, context, steps, rounds, options, progress)
    return [row | of_engine for row, of_engine in zip(rows, speeds, strict=True)]


def _quality(
    folder: Path,
    texts: dict[str, str],
    pairs: Sequence[Pair],
    tokens: int,
    max_length: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Perplexities with their standard errors and, for comparing, the log-probabilities of all tokens."""
    found: dict[str, Any] = {"texts": {}, "accuracy": None}
    with LLM(folder, **options) as llm:
        length = min(max_length or llm.max_model_len, llm.max_model_len)
        for name, text in texts.items():
            ids = llm.tokenizer.encode(text, add_special_tokens=False)[:tokens]
            windows = [ids[start : start + length] for start in range(0, len(ids), length)]
            scores = llm.score([window for window in windows if len(window) > 1], "full", add_bos=False)
            found["texts"][name] = {
                "tokens": scores.sums.num_tokens,
                "perplexity": scores.sums.perplexity,
                "stderr": scores.sums.perplexity_stderr,
                "logprobs": [p for each in scores.texts for p in each.logprobs if p is not None],
            }
        if pairs:
            sums = llm.loglikelihood([("", sentence) for pair in pairs for sentence in (pair.good, pair.bad)])
            right = [good.logprob > bad.logprob for good, bad in zip(sums[::2], sums[1::2], strict=True)]
            found["accuracy"] = statistics.mean(right)
    return found


def _compare(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Ratios of perplexities to those of the first model, with standard errors of the paired tokens."""
    for name, text in row["texts"].items():
        reference = first["texts"][name]
        if text["tokens"] != reference["tokens"]:
            raise ValueError(f"{row['model']}: cuts {name} into other tokens than {first['model']} does")
        lost = [a - b for a, b in zip(reference["logprobs"], text["logprobs"], strict=True)]
        text["ratio"] = math.exp(statistics.fmean(lost))
        text["ratio_stderr"] = text["ratio"] * statistics.stdev(lost) / math.sqrt(len(lost))


def _speeds(
    folders: Sequence[Path],
    streams: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    options: dict[str, Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Types, bytes of a cached token and speeds of each model: tokens a second in the median of the rounds, and the
    median of their ratios to the first model's."""
    longest = context + steps + WARM_STEPS
    rates: list[dict[str, list[float]]] = [{} for _ in folders]
    # one thread for all engines: each thread that computes keeps a team of OpenMP threads
    with ThreadPoolExecutor(1) as engine_thread:
        engines = [_engine(folder, max(streams), longest, options) for folder in folders]
        for number in range(rounds + 1):
            for folder, engine, of_model in zip(folders, engines, rates, strict=True):
                progress(f"{folder}: speed, round {number} of {rounds}")
                measured = engine_thread.submit(_round, engine, streams, context, steps, number).result()
                for name, rate in measured.items() if number else ():
                    of_model.setdefault(name, []).append(rate)
        found = []
        for engine, of_model in zip(engines, rates, strict=True):
            speeds = {
                name: {
                    "tokens_per_s": statistics.median(mine),
                    "ratio": statistics.median(a / b for a, b in zip(mine, rates[0][name], strict=True)),
                }
                for name, mine in of_model.items()
            }
            backend = engine.backend
            found.append({"dtype": backend.types, "cache_bytes": backend.cache_bytes_per_token, "speeds": speeds})
            engine.close()
    return found


def _engine(folder: Path, streams: int, longest: int, options: dict[str, Any]) -> Engine:
    config = load_config(folder)
    if longest > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"context: {longest} tokens with the steps exceed the {most} positions of {folder}")
    blocks = streams * (-(-longest // 64) + 1)
    memory = blocks * 64 * bytes_per_token(config, "full", torch.float32, 32)  # the most of any layout
    settings = load_settings(**options, max_num_seqs=streams, kv_cache_memory=memory)
    return build_engine(folder, settings.engine_options())


def _round(engine: Engine, streams: Sequence[int], context: int, steps: int, seed: int) -> dict[str, float]:
    """Tokens a second of decoding at each number of streams, and of a prompt."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=steps + WARM_STEPS, ignore_eos=True, temperature=0)

    def prompt() -> list[int]:
        return [rng.randrange(engine.model_config.vocab_size) for _ in range(context)]

    found = {}
    for count in streams:
        seconds, _ = step_time(engine, [prompt() for _ in range(count)], params, params, steps)
        found[f"decode {count}"] = count / seconds
    started = time.perf_counter()
    engine.add_request(Request("prompt", prompt(), SamplingParams(max_tokens=1, temperature=0)))
    while engine.has_work:
        engine.step()
    found["prefill"] = context / (time.perf_counter() - started)
    return found


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Two tables: quality and sizes, then speeds."""
    from rich.table import Table

    from server.bench.report import stdout_console

    quality = Table(title=f"perplexity, and its ratio to {rows[0]['model']}")
    quality.add_column("model", overflow="fold")
    for name in rows[0]["texts"]:
        quality.add_column(f"{Path(name).name} ({rows[0]['texts'][name]['tokens']:,} tokens)", justify="right")
    for name in ("minimal pairs", "parameters", "cache bytes per token"):
        quality.add_column(name, justify="right")
    for row in rows:
        cells = []
        for text in row["texts"].values():
            cells.append(
                f"{text['perplexity']:.2f} ± {text['stderr']:.2f}\n{text['ratio']:.3f} ± {text['ratio_stderr']:.3f}"
            )
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        quality.add_row(row["model"], *cells, accuracy, f"{row['parameters']:,}", f"{row['cache_bytes']:,}")
    speed = Table(title=f"tokens per second, and their ratio to {rows[0]['model']}")
    speed.add_column("model", overflow="fold")
    speed.add_column("types")
    for name in rows[0]["speeds"]:
        count = name.removeprefix("decode ")
        label = name if name == "prefill" else f"decoding, {count} {'stream' if count == '1' else 'streams'}"
        speed.add_column(label, justify="right")
    for row in rows:
        cells = [f"{found['tokens_per_s']:,.1f} ({found['ratio']:.2f}x)" for found in row["speeds"].values()]
        speed.add_row(row["model"], row["dtype"], *cells)
    console = stdout_console()
    console.print(quality, highlight=False)
    console.print(speed, highlight=False)
