"""`lpa export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.command import StoredDtype, check_new, user_errors

export = typer.Typer(
    help="Write models in the formats of other servers.", no_args_is_help=True, pretty_exceptions_enable=False
)


@export.command("hf-llama")
def hf_llama(
    source: Annotated[Path, typer.Argument(help="Model folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    dtype: StoredDtype = "float32",
) -> None:
    """Merge every low-rank pair into a dense matrix: a LLaMA that transformers, vLLM and llama.cpp's converter read.

    A model with qk_norm becomes a Qwen3, which is LLaMA with that norm.
    """
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.checkpoint import load_config
    from lpa_model.convert.export import export_llama

    with user_errors():
        check_new(folder)
        parameters = export_llama(source, folder, resolve_dtype(dtype, torch.device("cpu")))
        name = "Qwen3" if load_config(source).qk_norm else "LLaMA"
    typer.echo(f"{folder}: {name}, {parameters:,} parameters in {dtype}")


@export.command("transformers")
def transformers(
    source: Annotated[Path, typer.Argument(help="Model folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    dtype: StoredDtype = "float32",
) -> None:
    """Keep the factors: a folder with the model's code, for transformers and what is built on it.

    `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` reads it, and so does `lpa serve`, also after
    training there.
    """
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.convert.export_transformers import export_transformers

    with user_errors():
        check_new(folder)
        parameters = export_transformers(source, folder, resolve_dtype(dtype, torch.device("cpu")))
    typer.echo(f"{folder}: for transformers with trust_remote_code, {parameters:,} parameters in {dtype}")
