"""`lpa quantize`."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli.command import check_new, counts_bar, sigterm_unwinds, user_errors

if TYPE_CHECKING:
    from lpa_model.convert.quantize import Matrix


def quantize(
    source: Annotated[Path, typer.Argument(help="Model folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    weights: Annotated[Literal["int8", "int4"], typer.Option(help="Of the matrices; the head's are int8.")] = "int8",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text that int4 is calibrated on (UTF-8, .gz too); may be repeated.",
            show_default="books and encyclopedia",
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to calibrate int4 on; 0 rounds to the nearest, as at load.")
    ] = 16384,
) -> None:
    """Write a model with its matrices in 8 or 4 bits: a smaller file, that loads faster and reads as quickly.

    int4 is calibrated: weights are rounded for what the layers read of a text, and some matrices stay in int8.
    `lpa score --compare SOURCE FOLDER TEXTS` says what it costs.
    """
    from lpa_model.checkpoint import load_config, load_tokenizer
    from lpa_model.convert.lowrank.text import read_texts
    from lpa_model.convert.quantize import quantize_folder

    started, windows = time.perf_counter(), None
    with user_errors(), sigterm_unwinds():
        check_new(folder)
        if weights == "int8" and calibrate:
            raise ValueError("calibrate: is for --weights int4; int8 needs no text")
        if calibrate and not calibrate_tokens:
            raise ValueError("calibrate_tokens: 0 takes no text; leave --calibrate away, or give more tokens")
        if weights == "int4" and calibrate_tokens:
            texts = read_texts(load_config(source), load_tokenizer(source), calibrate or [], calibrate_tokens)
            windows = texts.calibration
        with counts_bar() as report:
            matrices = quantize_folder(source, folder, weights, windows, partial(report, "rounding"))
    for matrix in matrices:
        if matrix.weights == "bfloat16":
            typer.echo(f"{matrix.name} stays in bfloat16: its error would be {matrix.error:.1%}")
    layers = [matrix for matrix in matrices if matrix.name != "lm_head"]
    worst = max(matrices, key=lambda matrix: matrix.error)
    if windows is not None:
        _print_bits(layers)
        nats = sum(matrix.nats or 0.0 for matrix in layers)
        typer.echo(
            f"calibrated on {windows.numel():,} tokens in {time.perf_counter() - started:.0f} s; estimated to cost "
            f"{nats:.3f} nats per token"
        )
    size = (folder / "model.safetensors").stat().st_size
    count = sum(matrix.weights == weights for matrix in matrices)
    bits = 8 * sum(matrix.bytes for matrix in layers) / sum(matrix.count for matrix in layers)
    typer.echo(
        f"{folder}: {count} of {len(matrices)} matrices in {weights}, {bits:.2f} bits for each weight of the layers, "
        f"{size:,} bytes; the largest error is that of {worst.name}, {worst.error:.1%} of its "
        f"{'norm' if windows is None else 'outputs'}"
    )


def _print_bits(matrices: list[Matrix]) -> None:
    """A row per kind of matrix: the layers in which it is in int8, and its errors."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[tuple[str, Matrix]]] = defaultdict(list)
    for matrix in matrices:
        _, layer, kind = matrix.name.split(".", 2)
        kinds[kind].append((layer, matrix))
    table = Table(title="relative error of the outputs, and what it costs", box=SIMPLE)
    for column in ("matrix", "int4", "int8", "nats", "layers in int8"):
        table.add_column(column, justify="left" if column in ("matrix", "layers in int8") else "right")
    for kind, found in kinds.items():
        cells = []
        for weights in ("int4", "int8"):
            errors = [matrix.error for _, matrix in found if matrix.weights == weights]
            cells.append(f"{sum(errors) / len(errors):.1%}" if errors else "")
        nats = sum(matrix.nats or 0.0 for _, matrix in found)
        eight = ", ".join(layer for layer, matrix in found if matrix.weights == "int8")
        table.add_row(kind, *cells, f"{nats:.4f}", eight)
    Console().print(table, highlight=False)
