"""`lpa score`."""

from __future__ import annotations

import csv
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
Unit = Literal["word", "region"]
SEPARATOR = "|"
TOKEN_FIELDS = ("id", "text", "offset", "logprob", "surprisal", "entropy", "rank")
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
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print a row of CSV for each text, or with --unit for each word or region.")
    ] = False,
    unit: Annotated[
        Unit | None,
        typer.Option(help="Surprisal in bits of each word or each region; with --csv or --json."),
    ] = None,
    boundary_correction: Annotated[
        bool,
        typer.Option(
            "--boundary-correction/--no-boundary-correction",
            help="The probability of the space before a word belongs to the word before it.",
        ),
    ] = True,
    region_separator: Annotated[
        str | None, typer.Option(help="What stands between regions; it is taken out before scoring.", show_default="|")
    ] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Add a hash by which others can check the numbers.")] = False,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="Write a line of JSON for every token, or of CSV if the name ends in .csv: its log-probability, "
            "surprisal, entropy and rank."
        ),
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
        of_one: dict[str, object] = {"unit": unit, "digest": digest or None, "csv": as_csv or None}
        _check_together("compare", compare, model=model, tokens=tokens, **of_one, **cached)
        _check_together("json", as_json or None, csv=as_csv or None)
        _check_unit(unit, as_json or as_csv, boundary_correction, region_separator)
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
            file = stack.enter_context(tokens.open("w", encoding="utf-8", newline=""))
            on_tokens = (_csv_writer if tokens.suffix.lower() == ".csv" else _writer)(file)
        if url is not None:
            from server.scoring import remote

            key = None if api_key is None else api_key.partition(",")[0]  # a server's variable may list several
            asked |= {"model": model, "digest": digest}
            if unit is not None:
                asked |= {"unit": unit, "boundary_correction": boundary_correction}
                asked |= {"region_separator": region_separator}
            start: Start = partial(remote.score_texts, url, key, asked, texts)
            extra: dict[str, Any] = {}
        else:
            available(model)
            from server.llm import LLM, Options
            from server.scoring import local
            from server.scoring.units import Units

            with ends_at_once():
                options: Options = {"dtype": dtype, "weights": weights, "threads": threads}
                options["kv_cache_dtype"] = kv_cache_dtype
                llm = stack.enter_context(LLM(model, **options))
            units = None
            if unit is not None:
                units = Units(name=unit, correction=boundary_correction, separator=region_separator or SEPARATOR)
            start = partial(local.score_texts, llm, llm.convention(**asked), texts, units=units, digest=digest)
            extra = {"dtype": llm.dtype}
        lines = _lines(start, on_tokens, size)
        if as_json:
            report.print_json(lines, extra, sys.stdout)
        elif as_csv:
            if (found_digest := report.print_csv(lines, sys.stdout)) is not None:
                typer.echo(f"digest {found_digest}", err=True)
        else:
            report.print_table(lines, extra)


def _check_together(name: str, value: object, **others: object) -> None:
    for other, given in others.items():
        if value is not None and given is not None:
            raise ValueError(f"--{other}: cannot be combined with --{name}")


def _check_unit(unit: str | None, is_shown: bool, correction: bool, separator: str | None) -> None:
    if unit is not None and not is_shown:
        raise ValueError("--unit: needs --csv or --json")
    if unit is None and not correction:
        raise ValueError("--no-boundary-correction: has no meaning without --unit")
    if unit != "region" and separator is not None:
        raise ValueError("--region-separator: has no meaning without --unit region")
    if separator == "":
        raise ValueError("--region-separator: is empty")


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
            line = source.fields() | {name: entry[name] for name in TOKEN_FIELDS}
            file.write(json.dumps(line) + "\n")

    return write


def _csv_writer(file: IO[str]) -> OnTokens:
    table = csv.DictWriter(file, ("file", "line", *TOKEN_FIELDS), extrasaction="ignore", lineterminator="\n")
    table.writeheader()

    def write(source: Source, entries: list[dict[str, Any]]) -> None:
        table.writerows(source.fields() | entry for entry in entries)

    return write
