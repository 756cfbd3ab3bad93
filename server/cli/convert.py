"""`lpa convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.command import StoredDtype, user_errors

convert = typer.Typer(
    help="Import models that other code has trained.", no_args_is_help=True, pretty_exceptions_enable=False
)


@convert.callback()
def _convert() -> None:
    """Keeps `official` a sub-command while it is the only one."""


@convert.command()
def official(
    source: Annotated[Path, typer.Argument(help="Folder with model.safetensors or pytorch_model.bin.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; needed in setting 1.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary positions (setting 2).")] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(min=1, help="Context in tokens (setting 2).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, if the source folder has none.")] = None,
    dtype: StoredDtype = "float32",
) -> None:
    """Import a checkpoint of the LPA paper's authors; what its shapes do not tell is an option."""
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.convert.official import convert_official

    with user_errors():
        config = convert_official(
            source,
            folder,
            num_heads=num_heads,
            rope_theta=rope_theta,
            max_position_embeddings=max_position_embeddings,
            tokenizer=tokenizer,
            dtype=resolve_dtype(dtype, torch.device("cpu")),
        )
    typer.echo(f"{folder}: {config.architecture}, {config.parameter_count():,} parameters in {dtype}")
