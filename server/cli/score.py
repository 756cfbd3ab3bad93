"""`lpa score`."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from server.cli.command import Dtype, Model, user_errors

if TYPE_CHECKING:
    from lpa_model.perplexity import Tally, Window


def score(
    files: Annotated[list[str], typer.Argument(help="Text files (UTF-8, .gz too), or - for standard input.")],
    model: Model = None,
    method: Annotated[
        Literal["full", "sliding"], typer.Option(help="One window for the whole text, or windows that slide over it.")
    ] = "sliding",
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window with its context.", show_default="the model's context"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the beginnings of windows.", show_default="half of max-length")
    ] = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Perplexity and bits per byte of texts, one text per file.

    A token is scored if a token stands before it, so the first one of a text is not.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lpa_model import perplexity
    from lpa_model.checkpoint import load_model, load_tokenizer, resolve_dtype
    from server.settings import load_settings

    with user_errors():
        settings = load_settings(model=model, dtype=dtype)
        device = torch.device(settings.device)
        weights = resolve_dtype(settings.dtype, device)
        lpa = load_model(settings.model, weights, device)
        tokenizer = load_tokenizer(settings.model)
        texts = [(name, _read(name)) for name in files]
    length = max_length or lpa.config.max_position_embeddings
    results: list[dict[str, Any]] = []
    corpus = perplexity.Tally()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    console = Console(stderr=True)
    silent = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=silent) as progress:
        for name, text in texts:
            task = progress.add_task(name, total=None)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            progress.update(task, total=len(ids))

            def advance(window: Window, task: Any = task) -> None:
                progress.advance(task, window.num_scored)

            with user_errors():
                try:
                    convention = perplexity.resolve_convention(
                        method,
                        length,
                        stride,
                        context=lpa.config.max_position_embeddings,
                        bos_token_id=lpa.config.bos_token_id,
                        eos_token_id=lpa.config.eos_token_id,
                        adds_bos=perplexity.adds_bos(tokenizer, lpa.config.bos_token_id),
                    )
                    tally = perplexity.score(lpa, ids, convention, advance)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            tally.count_text(text)
            corpus.add_text(tally)
            results.append(_score_result(name, tally))
    total = _score_result("total", corpus)
    if as_json:
        del total["file"]
        how = {"model": str(settings.model), "dtype": str(weights).removeprefix("torch."), "method": method}
        sizes = {"max_length": length} | ({"stride": convention.stride} if method == "sliding" else {})
        typer.echo(json.dumps({**how, **sizes, "data": results, "aggregate": total}, indent=2))
    else:
        _print_scores([*results, total] if len(results) > 1 else results)


def _read(name: str) -> str:
    """A text file or standard input; an error names the file."""
    from lpa_model.train import read_text

    try:
        return sys.stdin.read() if name == "-" else read_text(Path(name))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _score_result(file: str, tally: Tally) -> dict[str, Any]:
    fields = tally.metrics("full")
    keys = ("num_tokens", "num_bytes", "nll_sum", "perplexity", "bits_per_byte")
    return {"file": file} | {key: fields[key] for key in keys}


def _print_scores(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("file", overflow="fold")
    for name in ("tokens", "NLL sum (nats)", "perplexity", "bits per byte"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row["file"],
            f"{row['num_tokens']:,}",
            f"{row['nll_sum']:,.3f}",
            *("-" if row[key] is None else f"{row[key]:.4f}" for key in ("perplexity", "bits_per_byte")),
        )
    Console().print(table)
