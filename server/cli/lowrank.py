"""Low-rank factors behind `lpa convert`: the options, the progress and the report of what became of the model."""

from __future__ import annotations

import math
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli.command import counts_bar, interruptible

if TYPE_CHECKING:
    import torch

    from lpa_model.config import LPAConfig
    from lpa_model.convert.lowrank.convert import Budget, Row
    from lpa_model.convert.lowrank.text import Texts
    from lpa_model.perplexity import Tally

GROUP = "Low-rank factors"
Keep = Annotated[
    float | None, typer.Option(help="Share of the projections' parameters that stays.", rich_help_panel=GROUP)
]
CacheRatio = Annotated[
    float | None,
    typer.Option(
        help="Cache bytes of the dense model over those that are wanted; values alone carry it.", rich_help_panel=GROUP
    ),
]
OneRank = Annotated[
    int | None,
    typer.Option(
        "--rank", help="One rank, a multiple of 32, for every matrix in which it saves.", rich_help_panel=GROUP
    ),
]
AttentionOnly = Annotated[
    bool,
    typer.Option(
        "--attention-only", help="Feed-forward matrices stay, and --keep is of attention's.", rich_help_panel=GROUP
    ),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform", help="The same share of every matrix, instead of ranks by errors.", rich_help_panel=GROUP
    ),
]
How = Annotated[
    Literal["kfac", "weights", "none"],
    typer.Option(
        help="What weighs errors of outputs: gradients of a backward pass, the model's weights, or nothing.",
        rich_help_panel=GROUP,
    ),
]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        help="Calibration text (UTF-8, .gz too); may be repeated.",
        show_default="books and encyclopedia",
        rich_help_panel=GROUP,
    ),
]
CalibrateTokens = Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.", rich_help_panel=GROUP)]
Cuts = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps what is computed of the text, for other budgets; read if it is there already.",
        rich_help_panel=GROUP,
    ),
]
Repair = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Train the factors towards the dense model for so many steps, each of another 1024 tokens of the text; "
        "goes on after ^C.",
        rich_help_panel=GROUP,
    ),
]

POOR = 1.25
"""Perplexity against the dense model's from which a budget is called not worth having."""


@dataclass(frozen=True)
class LowRank:
    """The options of a command that makes factors."""

    keep: float | None
    cache_ratio: float | None
    rank: int | None
    attention_only: bool
    uniform: bool
    method: How
    calibrate: list[Path] | None
    calibrate_tokens: int
    cuts: Path | None
    repair: int | None

    def budget(self) -> Budget | None:
        """The budget that the options give; None without one of keep, cache_ratio and rank.

        Raises:
            ValueError: they contradict one another, or only make sense beside one of the three.
        """
        from lpa_model.convert.lowrank.convert import Budget

        if self.keep is None and self.cache_ratio is None and self.rank is None:
            for name in ("attention_only", "uniform", "calibrate", "cuts", "repair"):
                if getattr(self, name):
                    raise ValueError(f"{name}: needs keep, cache_ratio or rank beside it")
            return None
        return Budget(
            keep=self.keep,
            cache_ratio=self.cache_ratio,
            rank=self.rank,
            attention_only=self.attention_only,
            uniform=self.uniform,
            method=self.method,
        )


@contextmanager
def dense_beside(folder: Path) -> Iterator[Path]:
    """Where to write the dense model of which `folder` will be the factors; it is removed afterwards."""
    from lpa_model.convert.stream import check_free

    check_free(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".dense", dir=folder.parent) as place:
        yield Path(place) / "model"


def factorise_folder(source: Path, folder: Path, options: LowRank, budget: Budget, dtype: str) -> None:
    """Make factors of a dense model folder, repair them if that is wanted, and print what became of the model.

    Raises:
        ValueError: of the folders, the text or the budget.
    """
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.checkpoint import load_config, load_tokenizer
    from lpa_model.convert.lowrank.convert import check_source, factorise
    from lpa_model.convert.lowrank.text import read_texts
    from server.engine.memory import retain_freed_memory

    retain_freed_memory()
    started = time.perf_counter()
    before, stored = check_source(source, budget), resolve_dtype(dtype, torch.device("cpu"))
    paths, steps = options.calibrate or [], options.repair or 0
    texts = read_texts(before, load_tokenizer(source), paths, options.calibrate_tokens, steps)
    if options.repair is None:
        with counts_bar() as tick:
            rows = factorise(
                source,
                folder,
                budget,
                texts.calibration,
                stored,
                cuts=options.cuts,
                progress=lambda *done: tick("cutting", *done),
            )
    else:
        rows = _repaired(source, folder, budget, texts, options.repair, stored, options.cuts)
    after = load_config(folder)
    print_ranks(rows, before)
    print_sizes(before, after)
    print_perplexities(source, folder, texts)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    typer.echo(
        f"{folder}: calibrated on {texts.calibration.numel():,} tokens, {seconds:.0f} s, "
        f"{time.process_time():.0f} s of processor time, {peak:.2f} GiB of memory at most"
    )


def _repaired(
    source: Path, folder: Path, budget: Budget, texts: Texts, steps: int, dtype: torch.dtype, cuts: Path | None
) -> list[Row]:
    import torch

    from lpa_model.convert.lowrank import repair
    from lpa_model.convert.stream import check_free

    check_free(folder)
    work = folder.resolve().with_name(folder.name + ".repair")
    held_out = next(iter(texts.measured.values()))[:2]
    with counts_bar() as tick:
        rows = repair.prepare(source, work, budget, texts.calibration, texts.more, held_out, tick, cuts)
    stops = interruptible([signal.SIGINT, signal.SIGTERM], "saving after this step; once more ends at once\n")
    windows, step, started = torch.cat([texts.calibration, texts.more]), 0, time.perf_counter()
    with stops as came, counts_bar() as tick:
        for found in repair.repair(work, folder, windows, held_out, steps, dtype, lambda: bool(came)):
            step = found.step
            loss = "" if found.loss is None else f", KL {found.loss:.4f}"
            tick(f"repair{loss}", step, steps)
            if found.validation is not None:
                typer.echo(
                    f"step {step}{loss}, on text held out {found.validation:.4f} nats per token, "
                    f"{time.perf_counter() - started:.0f} s"
                )
    if came and step < steps:
        typer.echo(f"stopped at step {step}: the state is in {work}, and the same command goes on from there", err=True)
        raise typer.Exit(128 + came[0])
    return rows


def print_ranks(rows: list[Row], config: LPAConfig) -> None:
    """A line per layer: the rank of every matrix, and the share of its output, weighted, that is lost."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title="rank, and relative error of the output", box=SIMPLE)
    table.add_column("layer", justify="right")
    for name in config.projections:
        table.add_column(name, justify="right", no_wrap=True)
    found = {(row.layer, row.projection): row for row in rows}
    for layer in range(config.num_hidden_layers):
        cells = []
        for name in config.projections:
            row = found.get((layer, name))
            cells.append("dense" if row is None or row.rank is None else f"{row.rank} {row.error:.1%}")
        table.add_row(str(layer), *cells)
    Console().print(table, highlight=False)


def print_sizes(before: LPAConfig, after: LPAConfig) -> None:
    """Parameters and cache bytes, before and after."""
    from rich.console import Console
    from rich.table import Table

    def projections(config: LPAConfig) -> int:
        layers = range(config.num_hidden_layers)
        return sum(config.weight_count(name, layer) for layer in layers for name in config.projections)

    unit = 32  # the kernels pad widths of the cache to it
    caches = [c.cache_elements_per_token(c.default_cache_layout(), unit) for c in (before, after)]
    table = Table()
    for column in ("", "dense", "factors", "share"):
        table.add_column(column, justify="right" if column else "left")
    lines = {
        "parameters": (before.parameter_count(), after.parameter_count()),
        "of the projections": (projections(before), projections(after)),
        "cache bytes per token, float32": (4 * caches[0], 4 * caches[1]),
        "cache bytes per token, bfloat16": (2 * caches[0], 2 * caches[1]),
    }
    for name, (dense, factors) in lines.items():
        table.add_row(name, f"{dense:,}", f"{factors:,}", f"{factors / dense:.3f}")
    Console().print(table, highlight=False)


def print_perplexities(source: Path, folder: Path, texts: Texts) -> None:
    """Of both models on both texts, and whether the budget is worth having."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from lpa_model.checkpoint import load_model
    from lpa_model.convert.lowrank.text import measure

    tallies: list[dict[str, Tally]] = []
    for path in (source, folder):  # one after the other, so that memory holds one
        model = load_model(path, torch.float32, torch.device("cpu"))
        tallies.append({name: measure(model, windows) for name, windows in texts.measured.items()})
        del model
    table = Table(title="perplexity")
    for column in ("text, not calibrated on", "tokens", "dense", "factors", "ratio"):
        table.add_column(column, justify="left" if column.startswith("text") else "right")
    ratios = []
    for name in texts.measured:
        dense, factors = (tally[name] for tally in tallies)
        ratios.append(math.exp((factors.nll_sum - dense.nll_sum) / dense.num_tokens))
        cells = (f"{t.perplexity or math.inf:.2f} ± {t.perplexity_stderr or math.inf:.2f}" for t in (dense, factors))
        table.add_row(name, f"{dense.num_tokens:,}", *cells, f"{ratios[-1]:.3f}")
    Console().print(table, highlight=False)
    if max(ratios) > POOR:
        typer.echo(
            f"perplexity is up to {max(ratios):.2f} times the dense model's: this budget is not worth having as it is. "
            "Keep more, or train the factors with --repair STEPS."
        )
