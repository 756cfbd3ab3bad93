"""`lpa score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from server.cli.command import CacheDtype, Dtype, Weights, available, ends_at_once, progress_bar, user_errors

if TYPE_CHECKING:
    from server.scoring.texts import Advance, OnTokens, Source

    Start: TypeAlias = Callable[[Advance, OnTokens | None], Iterator[dict[str, Any]]]
    Texts: TypeAlias = Iterator[tuple[Source, str]]

Method = Literal["full", "sliding", "rolling", "chunks"]
Size: TypeAlias = int | None  # bytes of all files, where it is known


def score(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Texts in UTF-8, one per file; .gz files are unpacked, - is standard input. Of a folder, its .txt and "
            ".md files at any depth."
        ),
    ],
    field: Annotated[
        str | None,
        typer.Option(
            help="The files are JSON lines, and this field of each line is a text. Of a folder, its .jsonl and .ndjson "
            "files."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder; with --url a model's name.",
            show_default="LPA_MODEL, or the embedded model; the first that the server lists",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Root of a running server that scores, instead of this process.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Sent to the server.", envvar="LPA_API_KEY", show_envvar=True)
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Two model folders with the same tokenizer, to be compared token by token."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="full: one window. sliding: windows that overlap. rolling: as lm-evaluation-harness. chunks: as "
            "llama-perplexity."
        ),
    ] = "sliding",
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a window with its context.", show_default="the model's context"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between the beginnings of sliding windows.", show_default="half of max-length"),
    ] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option("--add-bos/--no-add-bos", help="BOS before a text.", show_default="the tokenizer's own setting"),
    ] = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: CacheDtype = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the matrix products.", show_default="LPA_THREADS, or all")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every measure, instead of a table.")
    ] = False,
    tokens: Annotated[
        Path | None, typer.Option(help="Write a line of JSON for every token: its log-probability and rank.")
    ] = None,
) -> None:
    """Perplexity and bits per byte of texts, each scored by itself, and of all together.

    Of more than 20 texts the table shows those that are predicted worst; --json has all.
    """
    from server.scoring import report
    from server.scoring.texts import find_files, read_texts, total_size

    asked: dict[str, Any] = {"method": method, "max_length": max_length, "stride": stride, "add_bos": add_bos}
    with user_errors(), ExitStack() as stack:
        cached: dict[str, object] = {"kv-cache-dtype": kv_cache_dtype}
        _check_together("url", url, compare=compare, dtype=dtype, weights=weights, threads=threads, **cached)
        _check_together("compare", compare, model=model, tokens=tokens, **cached)
        found = find_files(files, field)
        texts, size = read_texts(found, field), total_size(found)
        if compare is not None:
            for one in compare:
                available(one)
            comparison = _compare(compare, dtype, threads, asked, texts, size)
            if as_json:
                typer.echo(json.dumps(comparison, indent=2))
            else:
                report.print_comparison(comparison)
            return
        on_tokens = None
        if tokens is not None:
            on_tokens = _writer(stack.enter_context(tokens.open("w", encoding="utf-8")))
        if url is not None:
            from server.scoring import remote

            key = None if api_key is None else api_key.partition(",")[0]  # a server's variable may list several
            start: Start = partial(remote.score_texts, url, key, {"model": model, **asked}, texts)
            extra: dict[str, Any] = {}
        else:
            available(model)
            from server.llm import LLM, Options
            from server.scoring import local

            with ends_at_once():
                options: Options = {"dtype": dtype, "weights": weights, "threads": threads}
                options["kv_cache_dtype"] = kv_cache_dtype
                llm = stack.enter_context(LLM(model, **options))
            start = partial(local.score_texts, llm, llm.convention(**asked), texts)
            extra = {"dtype": llm.dtype}
        lines = _lines(start, on_tokens, size)
        if as_json:
            report.print_json(lines, extra, sys.stdout)
        else:
            report.print_table(lines, extra)


def _check_together(name: str, value: object, **others: object) -> None:
    for other, given in others.items():
        if value is not None and given is not None:
            raise ValueError(f"--{other}: cannot be combined with --{name}")


def _compare(
    folders: tuple[Path, Path], dtype: str | None, threads: int | None, asked: dict[str, Any], texts: Texts, size: Size
) -> dict[str, Any]:
    """What a comparison prints as JSON; a folder that is named twice is loaded once."""
    from server.scoring.compare import common_convention, compare_texts, load
    from server.settings import load_settings, local_model

    settings = load_settings(dtype=dtype, threads=threads)
    with ends_at_once():
        one, other = (local_model(folder) for folder in folders)
        a = load(one, settings)
        b = a if one.resolve() == other.resolve() else load(other, settings)
    convention = common_convention(a, b, asked)
    with _progress(size) as advance:
        found = compare_texts(a, b, convention, texts, advance)
    for name, folder, side in zip("ab", folders, (a, b), strict=True):
        found[name] = {"model": str(folder), "dtype": side.dtype, **found[name]}
    return found


def _lines(start: Start, on_tokens: OnTokens | None, size: Size) -> Iterator[dict[str, Any]]:
    """The lines of an answer, with a progress bar while they come."""
    with _progress(size) as advance:
        yield from start(advance, on_tokens)


@contextmanager
def _progress(size: Size) -> Iterator[Advance]:
    """A bar on a terminal's stderr, over the bytes of the files."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn())
    with progress_bar(*columns) as progress:
        task = progress.add_task("", total=size, tokens=0)
        done = 0

        def advance(size: float, tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.update(task, advance=size, tokens=done)

        yield advance


def _writer(file: IO[str]) -> OnTokens:
    def write(source: Source, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            line = source.fields() | {name: entry[name] for name in ("id", "text", "offset", "logprob", "rank")}
            file.write(json.dumps(line) + "\n")

    return write
