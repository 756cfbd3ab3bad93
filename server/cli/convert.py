"""`lpa convert`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli import lowrank as factors
from server.cli.command import StoredDtype, progress_bar, sigterm_unwinds, user_errors

if TYPE_CHECKING:
    import torch

    from lpa_model.config import LPAConfig, Projection
    from lpa_model.convert.stream import Progress

KeptDtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the weights written; auto keeps each tensor's own.")
]

convert = typer.Typer(
    help="Import models that other code has trained.", no_args_is_help=True, pretty_exceptions_enable=False
)


@convert.callback()
def _convert(context: typer.Context) -> None:
    context.with_resource(sigterm_unwinds())


@convert.command()
def official(
    source: Annotated[Path, typer.Argument(help="Training folder, checkpoint-N folder, or file of weights.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; needed in setting 1.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary positions (setting 2).")] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(min=1, help="Context in tokens (setting 2).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or .model, if the source has none.")] = None,
    dtype: StoredDtype = "float32",
) -> None:
    """Import a checkpoint of the LPA paper's authors; what its shapes do not tell is an option."""
    import torch

    from lpa_model.backends.features import resolve_dtype
    from lpa_model.convert.official import convert_official
    from lpa_model.convert.source import find_weights

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
        for path in find_weights(source):
            typer.echo(f"read {path}")
    typer.echo(f"{folder}: {config.architecture}, {config.parameter_count():,} parameters in {dtype}, all finite")
    typer.echo(f"heads {config.num_attention_heads} of head_dim {config.head_size}, layers {config.num_hidden_layers}")
    typer.echo("ranks " + "  ".join(f"{name} {_ranks(config, name)}" for name in config.projections))
    typer.echo(f"context {config.max_position_embeddings} tokens, vocabulary {config.vocab_size}")


@convert.command()
def llama(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Hugging Face folder, GGUF file, or name of a model of the hub (OWNER/NAME)."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the hub.")] = None,
    file: Annotated[str | None, typer.Option(help="GGUF file of a model of the hub that has such.")] = None,
    keep: factors.Keep = None,
    cache_ratio: factors.CacheRatio = None,
    rank: factors.OneRank = None,
    attention_only: factors.AttentionOnly = False,
    uniform: factors.Uniform = False,
    method: factors.How = "kfac",
    calibrate: factors.Calibrate = None,
    calibrate_tokens: factors.CalibrateTokens = 65536,
    cuts: factors.Cuts = None,
    repair: factors.Repair = None,
    dtype: KeptDtype = "auto",
) -> None:
    """Take over a dense LLaMA, Mistral, Qwen2, Qwen3 or SmolLM as it is, with dense matrices: it computes the same.

    With --keep, --cache-ratio or --rank its matrices become low-rank factors within that budget.
    """
    from lpa_model.convert.gguf import convert_gguf
    from lpa_model.convert.hub import fetched
    from lpa_model.convert.hub_name import hub_name
    from lpa_model.convert.llama import convert_llama

    options = factors.LowRank(
        keep, cache_ratio, rank, attention_only, uniform, method, calibrate, calibrate_tokens, cuts, repair
    )
    with user_errors(), ExitStack() as stack:
        path = Path(source)
        if hub_name(source) is not None:
            path = fetched(source, revision=revision, file=file)
        elif revision is not None or file is not None:
            raise ValueError(f"--{'file' if revision is None else 'revision'}: {source} is no model of the hub")
        take = convert_gguf if path.is_file() else convert_llama
        if (budget := options.budget()) is not None:
            with _progress() as progress:
                dense = stack.enter_context(factors.dense_beside(folder))
                take(path, dense, _torch_dtype(dtype), progress)
            factors.factorise_folder(dense, folder, options, budget, "float32" if dtype == "auto" else dtype)
            return
        with _progress() as progress:
            config = take(path, folder, _torch_dtype(dtype), progress)
    _report(folder, config)


@convert.command()
def gguf(
    source: Annotated[Path, typer.Argument(help="GGUF file (llama.cpp's), or any file of a split one.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    dtype: KeptDtype = "auto",
) -> None:
    """Take over a dense LLaMA, Qwen2 or Qwen3 from a GGUF file, its tokenizer and chat template too.

    Quantised matrices become float32, or what --dtype says.
    """
    from lpa_model.convert.gguf import convert_gguf

    with user_errors(), _progress() as progress:
        config = convert_gguf(source, folder, _torch_dtype(dtype), progress)
    _report(folder, config)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr while a model is written."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    with progress_bar(TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _torch_dtype(name: str) -> torch.dtype | None:
    """None for auto: every tensor's own."""
    import torch

    from lpa_model.backends.features import resolve_dtype

    return None if name == "auto" else resolve_dtype(name, torch.device("cpu"))


def _report(folder: Path, config: LPAConfig) -> None:
    from lpa_model.checkpoint import stored_dtypes

    stored = ", ".join(stored_dtypes(folder))
    typer.echo(
        f"{folder}: {config.architecture}, dense, {config.parameter_count():,} parameters in {stored}, all finite"
    )


@convert.command()
def factored(
    source: Annotated[Path, typer.Argument(help="Folder or file of weights of a low-rank model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder with config.json and tokenizer, if the source has none.")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="A,B",
            help="Names of the factors in other projects' files: what follows the module's name, or all of it with "
            "{layer}, {part} (self_attn, mlp) and {name} (q to down). A is [rank, in], B [out, rank]; .T after a name: "
            "stored transposed. May be repeated.",
        ),
    ] = None,
    refactor: Annotated[
        bool, typer.Option("--refactor", help="Find the factors of dense matrices of low rank, by their spectrum.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="With --refactor: share of the largest singular value below which the others count as zero.",
            show_default="what rounding to the stored dtype leaves",
        ),
    ] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(min=1, help="A shorter context, in tokens.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or .model, if the source has none.")] = None,
    dtype: KeptDtype = "auto",
) -> None:
    """Take over a low-rank model of LEMS, SVD-LLM, DynRank, SpecTurn or ASVD, or of pairs by other names."""
    from lpa_model.checkpoint import stored_dtypes
    from lpa_model.convert.factored import convert_factored

    with user_errors(), _progress() as progress:
        pairs = [tuple(name.strip() for name in text.split(",")) for text in names or []]
        for text, pair in zip(names or [], pairs, strict=True):
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"--map {text}: not two names with a comma between them")
        if tolerance is not None and not refactor:
            raise ValueError("--tolerance: has no effect without --refactor")

        def looking(layer: int, layers: int) -> None:
            typer.echo(f"layer {layer + 1} of {layers}", err=True)

        done = convert_factored(
            source,
            folder,
            _torch_dtype(dtype),
            base=base,
            patterns=[(a, b) for a, b in pairs],
            refactor=refactor,
            tolerance=tolerance,
            max_position_embeddings=max_position_embeddings,
            tokenizer=tokenizer,
            layers=looking if refactor else None,
            progress=progress,
        )
    config = done.config
    typer.echo(
        f"{folder}: {config.architecture}, {config.parameter_count():,} parameters in "
        f"{', '.join(stored_dtypes(folder))}, all finite; "
        f"{config.vanilla().parameter_count():,} with dense matrices"
    )
    typer.echo("ranks " + "  ".join(f"{name} {_ranks(config, name)}" for name in config.projections))
    if done.projects:
        typer.echo(f"factors by the names of {', '.join(done.projects)}")
    if done.merged_head:
        typer.echo("the output head came in factors and is dense now")
    if refactor:
        typer.echo(f"products factored again: at most {done.error:.1e} of a matrix's norm is left out")


@convert.command()
def lowrank(
    source: Annotated[Path, typer.Argument(help="Dense model folder, as `lpa convert llama` writes it.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder.")],
    keep: factors.Keep = None,
    cache_ratio: factors.CacheRatio = None,
    rank: factors.OneRank = None,
    attention_only: factors.AttentionOnly = False,
    uniform: factors.Uniform = False,
    method: factors.How = "kfac",
    calibrate: factors.Calibrate = None,
    calibrate_tokens: factors.CalibrateTokens = 65536,
    cuts: factors.Cuts = None,
    repair: factors.Repair = None,
    dtype: StoredDtype = "float32",
) -> None:
    """Replace matrices of a dense model by low-rank factors, within a budget of parameters or cache bytes."""
    options = factors.LowRank(
        keep, cache_ratio, rank, attention_only, uniform, method, calibrate, calibrate_tokens, cuts, repair
    )
    with user_errors():
        if (budget := options.budget()) is None:
            raise ValueError("keep, cache_ratio or rank: one of them says how much of the model is to stay")
        factors.factorise_folder(source, folder, options, budget, dtype)


def _ranks(config: LPAConfig, projection: Projection) -> str:
    """A projection's rank, or from which to which it goes over the layers."""
    found = [config.rank(projection, layer) for layer in range(config.num_hidden_layers)]
    low_rank = [rank for rank in found if rank is not None]
    shown = [str(rank) for rank in sorted({min(low_rank), max(low_rank)})] if low_rank else []
    return " to ".join(shown + ["dense"] * (None in found))
