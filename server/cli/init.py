"""`lpa init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.command import AttentionRank, FFNRank, StoredDtype, check_new, config_of, user_errors, with_ranks


def init(
    preset: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.json", help="Shape of the model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="The weights follow from it.")] = 0,
    dtype: StoredDtype = "float32",
    attention_rank: AttentionRank = None,
    ffn_rank: FFNRank = None,
) -> None:
    """Write a model with random weights and a synthetic tokenizer, for benchmarks; it knows nothing."""
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.init import init_model

    with user_errors():
        check_new(folder)
        config = with_ranks(config_of(preset), attention_rank, ffn_rank)
        config = init_model(config, folder, seed, resolve_dtype(dtype, torch.device("cpu")))
    typer.echo(f"{folder}: {config.parameter_count():,} random parameters in {dtype}")
