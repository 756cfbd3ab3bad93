"""`lpa quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.command import check_new, user_errors


def quantize(
    source: Annotated[Path, typer.Argument(help="Model folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    weights: Annotated[Literal["int8", "int4"], typer.Option(help="Of the matrices; the head's are int8.")] = "int8",
) -> None:
    """Write a model with its matrices in 8 or 4 bits: a smaller file, that loads faster and reads as quickly.

    `lpa score --compare SOURCE FOLDER TEXTS` says what it costs.
    """
    from lpa_model.convert.quantize import quantize_folder

    with user_errors():
        check_new(folder)
        matrices = quantize_folder(source, folder, weights)
    kept = [matrix for matrix in matrices if matrix.weights == "bfloat16"]
    worst = max(matrices, key=lambda matrix: matrix.error)
    for matrix in kept:
        typer.echo(f"{matrix.name} stays in bfloat16: its error would be {matrix.error:.1%}")
    size = (folder / "model.safetensors").stat().st_size
    typer.echo(
        f"{folder}: {len(matrices) - len(kept)} matrices in {weights}, {size:,} bytes; the largest error is that of "
        f"{worst.name}, {worst.error:.1%} of its norm"
    )
