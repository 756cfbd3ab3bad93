"""What the commands share: errors of the user, flags made from a class's fields, arguments of one kind."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from lpa_model.config import LPAConfig

T = TypeVar("T")
M = TypeVar("M", Path | None, str | None)

Model = Annotated[
    Path | None,
    typer.Option(
        help="Model folder, or OWNER/NAME on the Hugging Face hub.",
        show_default="LPA_MODEL, or the embedded model",
        callback=lambda model: available(model),
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option(help="dtype that the model computes in.", show_default="LPA_DTYPE, or auto"),
]
Weights = Annotated[
    Literal["auto", "float32", "bfloat16", "int8", "int4"] | None,
    typer.Option(help="Type that weights are held in.", show_default="LPA_WEIGHTS, or auto"),
]
CacheDtype = Annotated[
    Literal["auto", "int8"] | None,
    typer.Option("--kv-cache-dtype", help="Type of the cache's numbers.", show_default="LPA_KV_CACHE_DTYPE, or auto"),
]
StoredDtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights written.")]


def available(model: M) -> M:
    """A name of a model as it is; one that can be had nowhere ends the command, before anything heavy is imported."""
    from lpa_model.convert.hub_name import check_available

    if model is not None:
        try:
            check_available(str(model))
        except ValueError as error:
            fail(error)
    return model


def fail(message: object) -> NoReturn:
    """One line on stderr, exit status 2."""
    typer.echo(f"lpa: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


def spin_briefly() -> None:
    """Let torch's threads spin only briefly before they sleep; to be called before torch is imported.

    They wait for one another at every product: waking one that sleeps takes longer than a small product, and one that
    spins for milliseconds, as GNU's OpenMP has it, starves the very thread that is waited for where other programs
    compute on the same processors.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # about 0.15 ms


def collect_rarely() -> None:
    """Look for garbage less often, and not once more at the end; to be called before torch is imported.

    Its hundreds of thousands of objects live as long as the process: the collector would go through them again and
    again while they are made, and twice when the process ends, for a third of a short command's time.
    """
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """While a model is loaded, let SIGTERM and ^C end the process: threads that load are not waited for.

    A container's first process ignores a signal that it has no handler for.
    """

    def end(number: int, _: object) -> None:
        os.write(2, f"lpa: ended by {signal.Signals(number).name} before the model was loaded\n".encode())
        os._exit(128 + number)

    with _handled((signal.SIGINT, signal.SIGTERM), end):
        yield


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Give signals to a handler, and to their earlier ones afterwards; no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    earlier = {one: signal.signal(one, handler) for one in signals}
    try:
        yield
    finally:
        for one, before in earlier.items():
            signal.signal(one, before)


@contextmanager
def interruptible(signals: Sequence[signal.Signals], message: str = "") -> Iterator[list[int]]:
    """Yields a list into which the first of the signals comes, for work to end where it is whole; the message is then
    written to stderr. A second signal is handled as it was before."""
    came: list[int] = []

    earlier = {one: signal.getsignal(one) for one in signals}

    def note(number: int, _: object) -> None:
        came.append(number)
        for one, handler in earlier.items():
            signal.signal(one, handler)
        os.write(2, message.encode())  # what is buffered may be in the middle of a write

    with _handled(signals, note):
        yield came


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the process as ^C does, by an exception: what was written in passing is removed on the way."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    with _handled((signal.SIGTERM,), end):
        yield


def in_thread(work: Callable[[], T]) -> T:
    """The result of work that is long in libraries, where a signal would wait for its end: another thread does it.

    A signal that raises ends the waiting; the thread ends with the process.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]
    return done[0]


@contextmanager
def bytes_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr: what is done, and how much is read of `total` bytes."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)


@contextmanager
def counts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr: what is done, how much of it, of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


@contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """A bar on stderr while it is a terminal, gone when the work is done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user's arguments and files cause into `fail`."""
    from server.errors import UserError

    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (UserError, ValueError) as error:
        fail(error)


def check_new(folder: Path) -> None:
    """Raises ValueError where something is in the way of a new folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")


class GroupedCommand(TyperCommand):
    """A command whose help shows each option below the heading of its `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def lazy(make: Callable[[], Any]) -> type[TyperCommand]:
    """A command that `make` makes when it is run or completed or its help is shown: its options take long to import."""

    class Lazy(TyperCommand):
        def make_context(self, *args: Any, **kwargs: Any) -> Any:
            return make().make_context(*args, **kwargs)

    return Lazy


def command_of(parameters: Sequence[inspect.Parameter], run: Callable[[dict[str, Any]], None], text: str) -> Any:
    """A command with these parameters and this help, which calls `run` with those that were given (not None)."""

    def command(**values: Any) -> None:
        run({name: value for name, value in values.items() if value is not None})

    command.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]  # typer reads the parameters there
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(cls=GroupedCommand, help=text)(command)
    return typer.main.get_command(alone)


def flag(
    name: str,
    annotation: Any,
    text: str,
    default: object,
    metavar: str | None = None,
    group: str | None = None,
) -> inspect.Parameter:
    """An option `--name` (`--name/--no-name` for a bool) that is None unless given; the help shows `default`.

    A metavar of the form `a|b` lists the values that a shell completes. `group` is the heading in the help.
    """
    dashed = name.replace("_", "-")
    names = f"--{dashed}/--no-{dashed}" if annotation is bool else f"--{dashed}"
    if default is not None:
        text += f" [default: {default if annotation is not bool else 'yes' if default else 'no'}]"
    values = metavar.split("|") if metavar is not None and "|" in metavar else []

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    option = typer.Option(
        None,
        names,
        help=text,
        show_default=False,
        metavar=metavar,
        rich_help_panel=group,
        autocompletion=complete if values else None,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation | None)


RANK_HELP = "Rank of every {} projection, or dense."
AttentionRank = Annotated[
    str | None, typer.Option(help=RANK_HELP.format("attention"), metavar="N|dense", show_default="the model's own")
]
FFNRank = Annotated[
    str | None, typer.Option(help=RANK_HELP.format("feed-forward"), metavar="N|dense", show_default="the model's own")
]


def with_ranks(config: LPAConfig, attention_rank: str | None, ffn_rank: str | None) -> LPAConfig:
    """The config with other ranks, where they are given; ValueError for one that is neither a number nor `dense`."""
    changes: dict[str, Any] = {}
    for key, given in (("attention_rank", attention_rank), ("ffn_rank", ffn_rank)):
        if given is not None:
            if given != "dense" and not given.isdecimal():
                raise ValueError(f"{key}: {given!r} is neither a number nor dense")
            changes[key] = None if given == "dense" else int(given)
    return dataclasses.replace(config, **changes)


def config_of(name: str) -> LPAConfig:
    """A preset's config, or the one in a JSON file or a model folder."""
    from lpa_model.checkpoint import load_config
    from lpa_model.config import PRESETS, LPAConfig
    from lpa_model.convert.hub_name import hub_name
    from server.settings import local_model

    path = Path(name)
    if path.is_dir() or (path.suffix != ".json" and hub_name(name) is not None):
        return load_config(local_model(path))
    if name in PRESETS:
        return PRESETS[name]
    if path.suffix == ".json":
        return LPAConfig.load(path)
    presets = ", ".join(PRESETS)
    raise ValueError(f"{name}: neither a model folder nor a .json config nor a preset ({presets})")
