"""The `lpa` command. Whatever is heavy is imported by the command that needs it, so that `lpa --help` is quick.

A mistake of the user ends a command with one line on stderr and exit status 2.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from lpa_model.config import LPAConfig
    from lpa_model.perplexity import Window

app = typer.Typer(
    name="lpa",
    help="Train, convert, inspect and serve LPA (low-dimensional projected attention) language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
convert = typer.Typer(
    help="Import models that other code has trained.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(convert, name="convert")

# Commands whose flags are the fields of a class that is dear to import parse their own arguments.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

Model = Annotated[Path | None, typer.Option(help="Model folder.", show_default="LPA_MODEL, or the embedded model")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option(help="Type of the weights at work.", show_default="LPA_DTYPE, or auto"),
]
StoredDtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights written.")]


def main() -> None:
    """The entry point of the `lpa` command."""
    app()


def fail(message: object) -> NoReturn:
    """One line on stderr, exit status 2."""
    typer.echo(f"lpa: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


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


def run_with_flags(
    context: typer.Context, parameters: Sequence[inspect.Parameter], run: Callable[[dict[str, Any]], None], text: str
) -> None:
    """Parse the rest of the command line by `parameters` and call `run` with those that were given (not None)."""

    def command(**values: Any) -> None:
        run({name: value for name, value in values.items() if value is not None})

    command.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    inner.command(help=text)(command)
    inner(args=context.args, prog_name=context.command_path)


def flag(name: str, annotation: Any, text: str, default: object, metavar: str | None = None) -> inspect.Parameter:
    """An option `--name` (`--name/--no-name` for a bool) that is None unless given; the help shows `default`."""
    dashed = name.replace("_", "-")
    names = f"--{dashed}/--no-{dashed}" if annotation is bool else f"--{dashed}"
    if default is not None:
        text += f" [default: {default if annotation is not bool else 'yes' if default else 'no'}]"
    option = typer.Option(None, names, help=text, show_default=False, metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation | None)


@app.command(context_settings=PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Start the HTTP server on a model folder (`lpa serve --help` lists every setting)."""
    from server.settings import Settings

    folder = typer.Argument(None, metavar="MODEL", help="The same as --model.")
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("folder", positional, default=folder, annotation=str | None)]
    for name, field in Settings.model_fields.items():
        # pydantic reads values of every kind from text, for flags as for variables
        kind = bool if field.annotation is bool else str
        default = None if field.default_factory else field.default
        metavar = None if kind is bool else _metavar(field.annotation)
        parameters.append(flag(name, kind, field.description or "", default, metavar))
    run_with_flags(context, parameters, _serve, "Start the HTTP server. Every flag is also a variable: LPA_PORT=9000.")


def _metavar(annotation: Any) -> str:
    """What a flag's help calls its value: the choices of a Literal, else the type."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kind = next(part for part in (*get_args(annotation), annotation) if part is not type(None))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _serve(given: dict[str, Any]) -> None:
    from server.settings import load_settings

    with user_errors():
        if "folder" in given:
            if "model" in given:
                raise ValueError("--model: the model folder is given twice")
            given["model"] = given.pop("folder")
        settings = load_settings(**given)

    # a container's first process ignores a signal that it has no handler for, and loading takes seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from server.serve import serve as serve_http

    with user_errors():
        status = serve_http(settings)
    raise typer.Exit(status)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="random")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    dtype: Dtype = None,
) -> None:
    """Continue a text; the continuation streams to the terminal."""
    from server.engine.engine import build_engine
    from server.engine.request import Request, SamplingParams
    from server.settings import load_settings

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    with user_errors():
        settings = load_settings(model=model, dtype=dtype, max_num_seqs=1)
        engine = build_engine(settings.model, settings.engine_options())
        text = sys.stdin.read() if prompt == "-" else prompt
        request = Request("generate", engine.tokenizer.encode(text), params)
        engine.validate(request)
    engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="", flush=True)
    print()


@app.command()
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
    step = max(1, length // 2) if stride is None else stride
    results: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    console = Console(stderr=True)
    silent = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=silent) as progress:
        for name, text in texts:
            task = progress.add_task(name, total=None)
            ids = tokenizer.encode(text).ids
            progress.update(task, total=max(0, len(ids) - 1))

            def advance(window: Window, task: Any = task) -> None:
                progress.advance(task, window.num_scored)

            with user_errors():
                try:
                    nll_sum, num_tokens = perplexity.score(lpa, ids, method, length, step, advance)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                if not math.isfinite(nll_sum):
                    raise ValueError(f"{name}: the model gives log-probabilities that are not finite")
            results.append(_score_result(name, nll_sum, num_tokens, len(text.encode())))
    nll_sum, num_tokens, num_bytes = (sum(r[key] for r in results) for key in ("nll_sum", "num_tokens", "num_bytes"))
    total = _score_result("total", nll_sum, num_tokens, num_bytes)
    if as_json:
        del total["file"]
        how = {"model": str(settings.model), "dtype": str(weights).removeprefix("torch."), "method": method}
        sizes = {"max_length": length} | ({"stride": step} if method == "sliding" else {})
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


def _score_result(file: str, nll_sum: float, num_tokens: int, num_bytes: int) -> dict[str, Any]:
    from lpa_model.perplexity import bits_per_byte, perplexity

    value = perplexity(nll_sum, num_tokens) if num_tokens else math.nan
    return {
        "file": file,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "nll_sum": nll_sum,
        "perplexity": value if math.isfinite(value) else None,
        "bits_per_byte": bits_per_byte(nll_sum, num_bytes) if num_tokens else None,
    }


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


def _config_of(name: str) -> LPAConfig:
    """A preset's config, or the one in a JSON file or a model folder."""
    from lpa_model.checkpoint import load_config
    from lpa_model.config import PRESETS, LPAConfig

    path = Path(name)
    if path.is_dir():
        return load_config(path)
    if name in PRESETS:
        return PRESETS[name]
    if path.suffix == ".json":
        return LPAConfig.load(path)
    raise ValueError(f"{name}: neither a model folder nor a .json config nor a preset ({', '.join(PRESETS)})")


@app.command(context_settings=PASS_THROUGH)
def train(context: typer.Context) -> None:
    """Train a model from text, or go on with a run that was interrupted."""
    from lpa_model.train import TrainConfig
    from lpa_model.train import train as run

    defaults = inspect.signature(run).parameters

    def required(name: str, annotation: Any, text: str) -> inspect.Parameter:
        option = typer.Option(..., f"--{name}", help=text)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)

    preset = typer.Argument(..., metavar="PRESET|CONFIG.json", help="Shape of the model.")
    parameters = [
        inspect.Parameter("preset", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=preset, annotation=str),
        required("data", Path, "Training text (UTF-8, .gz too)."),
        required("valid", Path, "Validation text."),
        required("out", Path, "Folder of the run: tokenizer, tokens, state, and the model in `model`."),
        flag("validate_every", int, "Steps between validations.", defaults["validate_every"].default),
        flag("checkpoint_every", int, "Steps between states to resume from.", defaults["checkpoint_every"].default),
        flag("compile_loss", bool, "Compile the loss with torch.compile.", defaults["compile_loss"].default),
    ]
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = next(part for part in (*get_args(kinds[field.name]), kinds[field.name]) if part is not type(None))
        if field.default is dataclasses.MISSING:
            parameters.append(required(field.name, kind, ""))
        else:
            parameters.append(flag(field.name, kind, "", field.default))
    about = "Train a model from text, or go on with a run that was interrupted."
    run_with_flags(context, parameters, _train, f"{about}\n\n{inspect.getdoc(TrainConfig)}")


def _train(given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lpa_model.train import END_OF_TEXT, TrainConfig, encode, prepare
    from lpa_model.train import train as run

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    out: Path = given["out"]
    with user_errors():
        model_config = _config_of(given["preset"])
        config = TrainConfig(**{name: value for name, value in given.items() if name in names})
        context = model_config.max_position_embeddings
        if config.sequence_length > context:
            raise ValueError(f"sequence_length: {config.sequence_length} is more than the model's context of {context}")
        out.mkdir(parents=True, exist_ok=True)
        tokenizer, tokens, valid_text = prepare(given["data"], given["valid"], out, model_config.vocab_size)
        if tokenizer.get_vocab_size() != model_config.vocab_size:
            raise ValueError(
                f"data: the text yields a tokenizer of {tokenizer.get_vocab_size()} entries only, the model's "
                f"vocab_size is {model_config.vocab_size}"
            )
    model_config = dataclasses.replace(model_config, eos_token_id=tokenizer.token_to_id(END_OF_TEXT))
    loop = {name: given[name] for name in ("validate_every", "checkpoint_every", "compile_loss") if name in given}
    steps = run(model_config, config, tokenizer, tokens, valid_text, out, **loop)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    step, validation = None, None
    with user_errors(), Progress(*columns) as progress:
        task = progress.add_task(f"{len(tokens):,} tokens of text", total=config.steps)
        try:
            for step in steps:
                line = f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s"
                validation = step.validation or validation
                if validation is not None:
                    line += f"  validation {validation:.4f} bits/byte"
                progress.update(task, completed=step.step, description=line)
                if step.validation is not None or (not progress.console.is_terminal and step.step % 50 == 0):
                    progress.console.print(f"step {step.step}: {line}", highlight=False)
        except KeyboardInterrupt:
            state = f"the last state of {out}" if (out / "state.pt").exists() else "the beginning"
            typer.echo(f"stopped; the same command goes on from {state}", err=True)
            raise typer.Exit(130) from None
    if step is None or validation is None:
        typer.echo(f"{out} has all of its {config.steps} steps already; the model is in {out / 'model'}")
        return
    nats = validation * math.log(2) * len(valid_text.encode()) / len(encode(tokenizer, valid_text))
    typer.echo(f"validation: {validation:.4f} bits per byte, perplexity {math.exp(nats):.3f}; {out / 'model'}")


@app.command()
def init(
    preset: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.json", help="Shape of the model.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="The weights follow from it.")] = 0,
    dtype: StoredDtype = "float32",
) -> None:
    """Write a model with random weights and a synthetic tokenizer, for benchmarks; it knows nothing."""
    import torch

    from lpa_model.checkpoint import resolve_dtype
    from lpa_model.init import init_model

    with user_errors():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: exists and is not an empty folder")
        config = init_model(_config_of(preset), folder, seed, resolve_dtype(dtype, torch.device("cpu")))
    typer.echo(f"{folder}: {config.parameter_count():,} random parameters in {dtype}")


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

    from lpa_model.checkpoint import resolve_dtype
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


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|PRESET", help="Model folder, .json config or preset.", show_default="the embedded model"
        ),
    ] = None,
) -> None:
    """Sizes, ranks, parameters and cache bytes per token, beside those of the twin with dense attention."""
    from rich.console import Console
    from rich.table import Table

    from lpa_model.config import CacheLayout
    from server.settings import load_settings

    with user_errors():
        name = str(load_settings().model) if model is None else model
        config = _config_of(name)
        stored = _stored_dtypes(Path(name)) if Path(name).is_dir() else None
    dense = config.vanilla()
    facts = Table(title=name, show_header=False)
    for key, value in config.to_dict().items():
        if key != "model_type" and value is not None:
            facts.add_row(key, str(value))
    if stored is not None:
        facts.add_row("stored as", stored)
    parameters, dense_parameters = config.parameter_count(), dense.parameter_count()
    facts.add_row("parameters", f"{parameters:,}")
    facts.add_row("dense twin", f"{dense_parameters:,} ({dense_parameters / parameters:.2f}x)")

    cache = Table(title="cache per token")
    for column in ("layout", "numbers", "bfloat16 bytes", "float32 bytes", "twin / this"):
        cache.add_column(column, justify="left" if column == "layout" else "right")
    dense_elements = dense.cache_elements_per_token("full")
    for layout in get_args(CacheLayout):
        elements = config.cache_elements_per_token(layout)
        label = f"{layout} (default)" if layout == config.default_cache_layout() else layout
        cells = (elements, 2 * elements, 4 * elements)
        cache.add_row(label, *(f"{cell:,}" for cell in cells), f"{dense_elements / elements:.2f}x")
    cells = (dense_elements, 2 * dense_elements, 4 * dense_elements)
    cache.add_row("dense twin", *(f"{cell:,}" for cell in cells), "1.00x")
    console = Console()
    console.print(facts, cache, highlight=False)


def _stored_dtypes(folder: Path) -> str:
    """The dtypes of a folder's tensors, from the headers of its weight files."""
    from safetensors import safe_open

    from lpa_model.checkpoint import weight_files

    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return ", ".join(sorted({"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(d, d) for d in found))


if __name__ == "__main__":
    main()
