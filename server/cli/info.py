"""`lpa info`."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from server.cli.command import available, config_of, user_errors

if TYPE_CHECKING:
    from rich.table import Table

    from lpa_model.config import CacheLayout, LPAConfig, Rank, RankSpec

HEIGHTS = "▁▂▃▄▅▆▇█"


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|PRESET",
            help="Model folder, model of the Hugging Face hub, .json config or preset.",
            show_default="the embedded model",
            callback=lambda model: available(model),
        ),
    ] = None,
) -> None:
    """Sizes, ranks, parameters and cache bytes per token, beside those of the dense twin."""
    from rich.console import Console
    from rich.table import Table

    from lpa_model.backends.select import choose
    from lpa_model.checkpoint import held_otherwise, stored_dtypes, stored_weights
    from lpa_model.config import PRESETS, CacheLayout
    from server.settings import load_settings, local_model

    with user_errors():
        settings = load_settings()
        name = str(settings.model) if model is None else model
        config = config_of(name)
        folder = local_model(Path(name)) if name not in PRESETS else Path(name)
        stored = stored_dtypes(folder) if folder.is_dir() else None
        quantized = stored_weights(folder) if folder.is_dir() else None
        layout, block_size = settings.kv_cache_layout, settings.block_size
        choice = choose(
            config,
            dtype=settings.dtype,
            weights=settings.weights,
            stored=quantized,
            device=settings.device,
            layout=layout,
            cache_dtype=settings.kv_cache_dtype,
            block_size=block_size,
        )
    dense = config.vanilla()
    facts = Table(title=name, show_header=False)
    for key, value in dataclasses.asdict(config).items():
        if key in ("attention_rank", "ffn_rank"):
            facts.add_row(key, _ranks(value))
        elif value is not None:
            facts.add_row(key, str(value))
    if stored is not None:
        facts.add_row("stored as", ", ".join(stored))
    if quantized is not None:
        others = held_otherwise(folder)
        facts.add_row("not quantised", "\n".join(others.pop("bfloat16", [])) or "no matrix but the embedding")
        for kind, names in others.items():
            facts.add_row(f"in {kind}", _by_layer(names))
    parameters, dense_parameters = config.parameter_count(), dense.parameter_count()
    facts.add_row("parameters", f"{parameters:,}")
    facts.add_row("dense twin", f"{dense_parameters:,} ({dense_parameters / parameters:.2f}x)")

    facts.add_row("backend", f"{choice.name}{', batch-invariant' if choice.batch_invariant else ''}")
    for backend, reason in choice.refused:
        facts.add_row(f"not {backend}", reason)

    cache = Table(title="cache per token: numbers, and bytes by type")
    for column in ("layout", "numbers", "int8", "bfloat16", "float32", "twin / this"):
        cache.add_column(column, justify="left" if column == "layout" else "right")
    dense_elements = dense.cache_elements_per_token("full")
    for layout in get_args(CacheLayout):
        elements = config.cache_elements_per_token(layout)
        label = f"{layout} (default)" if layout == config.default_cache_layout() else layout
        cells = (elements, *_cache_bytes(config, layout))
        cache.add_row(label, *(f"{cell:,}" for cell in cells), f"{dense_elements / elements:.2f}x")
    cells = (dense_elements, *_cache_bytes(dense, "full"))
    cache.add_row("dense twin", *(f"{cell:,}" for cell in cells), "1.00x")
    console = Console()
    console.print(facts, highlight=False)
    if any(config.rank(name, layer) for name in config.projections for layer in range(config.num_hidden_layers)):
        console.print(_rank_map(config), highlight=False)
    console.print(cache, highlight=False)


def _cache_bytes(config: LPAConfig, layout: CacheLayout) -> list[int]:
    """In int8, bfloat16 and float32."""
    import torch

    from lpa_model.cache import bytes_per_token

    return [bytes_per_token(config, layout, dtype) for dtype in (torch.int8, torch.bfloat16, torch.float32)]


def _rank_map(config: LPAConfig) -> Table:
    """A row per projection with a block per layer, as high as its rank is in its full one; a dense one is light."""
    from rich.table import Table
    from rich.text import Text

    layers = range(config.num_hidden_layers)
    found = Table(title="ranks by layer (░ dense)", show_header=False)
    for name in config.projections:
        full = min(config.projection_sizes(name))
        ranks = [config.rank(name, layer) for layer in layers]
        blocks = Text(no_wrap=False)
        for rank in ranks:
            share = 1.0 if rank is None else min(1.0, rank / full)
            blocks.append("░" if rank is None else HEIGHTS[math.ceil(share * len(HEIGHTS)) - 1], style=_color(share))
        low = [rank for rank in ranks if rank is not None]
        span = " to ".join(map(str, sorted({min(low), max(low)}))) if low else "dense"
        found.add_row(name, blocks, span + ", some dense" * (bool(low) and len(low) < len(ranks)), f"of {full}")
    return found


def _by_layer(names: list[str]) -> str:
    """A line for each kind of matrix, with the layers in which it is one of `names`."""
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        _, layer, kind = name.split(".", 2)
        layers[kind].append(int(layer))
    return "\n".join(f"{kind}: {', '.join(map(str, sorted(found)))}" for kind, found in layers.items())


def _color(share: float) -> str:
    """From blue, a small rank, to red, a full one."""
    return f"rgb({round(40 + 190 * share)},90,{round(230 - 190 * share)})"


def _ranks(spec: RankSpec) -> str:
    """One rank, or a line per projection: its rank, or that of each layer."""

    def text(rank: Rank) -> str:
        return "dense" if rank is None else str(rank)

    if spec is None or isinstance(spec, int):
        return text(spec)
    lines = {name: ranks if isinstance(ranks, list) else [ranks] for name, ranks in spec.items()}
    return "\n".join(f"{name}: {', '.join(map(text, ranks))}" for name, ranks in lines.items())
