"""`lpa train`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import signal
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import typer

from server.cli.command import (
    RANK_HELP,
    bytes_bar,
    command_of,
    config_of,
    flag,
    in_thread,
    interruptible,
    user_errors,
    with_ranks,
)

if TYPE_CHECKING:
    from lpa_model.train.config import TrainConfig
    from lpa_model.train.data import Data

REQUIRED = ("preset", "data", "valid", "out")
LOOP = ("device", "report_every", "validate_every", "checkpoint_every", "compile_loss")
"""Options that the loop takes as they are."""


def train() -> None:
    """Train a model from text, or go on with a run that was interrupted."""


def train_command() -> Any:
    """`lpa train` with a flag for every field of TrainConfig."""
    about = "Train a model from text, or go on with a run that was interrupted; ^C saves it first."
    return command_of([parameter for parameter, _ in _parameters()], _train, about)


def _parameters() -> list[tuple[inspect.Parameter, object]]:
    """Every option, and its default where it has one."""
    from lpa_model.train.config import TrainConfig
    from lpa_model.train.loop import train as run

    defaults = {name: inspect.signature(run).parameters[name].default for name in LOOP}
    found: list[tuple[inspect.Parameter, object]] = []

    def add(name: str, kind: type, text: str, metavar: str | None = None) -> None:
        default = defaults.get(name)
        found.append((flag(name, kind, text, default, metavar), default))

    preset = typer.Argument(None, metavar="PRESET|CONFIG.json", help="Shape of the model.")
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found.append((inspect.Parameter("preset", place, default=preset, annotation=str | None), None))
    add("config", Path, "TOML file with any of these options, _ for -; what the command line says goes before it.")
    add("data", Path, "Training text: UTF-8 or JSONL, .gz too; or a folder of `lpa tokenize`.")
    add("valid", Path, "Validation text, likewise.")
    add("out", Path, "Folder of the run: tokenizer, tokens, state, metrics.csv, and the model in `model`.")
    add("field", str, "Field of a JSONL object that has the text. [default: text]")
    add("vocab_size", int, "Entries of the tokenizer, fewer for a small text. [default: the model's own]")
    for name, which in (("attention_rank", "attention"), ("ffn_rank", "feed-forward")):
        add(name, str, f"{RANK_HELP.format(which)} [default: the model's own]", "N|dense")
    add("device", str, "cpu, cuda or cuda:N.")
    add("report_every", int, "Steps between reports, each a line of metrics.csv; a GPU idles at each.")
    add("validate_every", int, "Steps between validations.")
    add("checkpoint_every", int, "Steps between states to resume from.")
    add("compile_loss", bool, "Compile the loss with torch.compile.")
    add("plot", Path, "Draw the losses at the end; needs the extra `plot` (matplotlib).", "FILE.png|.svg")
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind, text = _kind(kinds[field.name]), field.metadata["help"]
        made = flag(field.name, kind, text, field.default, group="What decides the weights")
        found.append((made, field.default))
    return found


def _kind(annotation: Any) -> type:
    """int of `int | None`."""
    found: type = next(part for part in (*get_args(annotation), annotation) if part is not NoneType)
    return found


def _options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the command line says, and else the file of --config; and lines that tell where each value comes from.

    Raises:
        ValueError: of the file; or neither has what is required.
    """
    from server.cli.config_file import read_options

    parameters = [(parameter, default) for parameter, default in _parameters() if parameter.name != "config"]
    path, given = given.get("config"), {name: value for name, value in given.items() if name != "config"}
    file = {}
    if path is not None:
        file = read_options(path, {parameter.name: _kind(parameter.annotation) for parameter, _ in parameters})
    for name in REQUIRED:
        if name not in given and name not in file:
            missing = "PRESET or CONFIG.json" if name == "preset" else f"--{name}"
            raise ValueError(f"{name}: give {missing}, or {name} in the file of --config")
    below = {name: value for name, value in file.items() if name not in given}
    used = given | below
    rest = {p.name: default for p, default in parameters if default is not None and p.name not in used}
    origins = {"command line": given, str(path): below, "defaults": rest}
    lines = [
        f"{origin}: {', '.join(f'{name} {value}' for name, value in values.items())}"
        for origin, values in origins.items()
        if values
    ]
    return used, lines


def _train(given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lpa_model.backends.features import resolve_device
    from lpa_model.train.config import TrainConfig
    from lpa_model.train.data import check_lengths
    from lpa_model.train.loop import train as run

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    with user_errors():
        given, lines = _options(given)
        out: Path = given["out"]
        model_config = with_ranks(config_of(given["preset"]), given.get("attention_rank"), given.get("ffn_rank"))
        if "vocab_size" in given:
            model_config = dataclasses.replace(model_config, vocab_size=given["vocab_size"])
        config = TrainConfig(**{name: value for name, value in given.items() if name in names})
        context = model_config.max_position_embeddings
        if config.longest > context:
            raise ValueError(f"sequence_length: {config.longest} is more than the model's context of {context}")
        if "plot" in given:
            from server.bench.plot import check_plot

            check_plot(given["plot"])
        resolve_device(given.get("device", "cpu"))  # before the text is tokenized, which takes minutes
        out.mkdir(parents=True, exist_ok=True)
        data = _data(given, out, model_config.vocab_size)
        check_lengths(config, len(data.train.ids), len(data.valid.ids))
        for line in [*lines, *_changes(out / "train.json", config)]:
            typer.echo(line, err=True)
    model_config = dataclasses.replace(model_config, eos_token_id=data.train.end_of_text)
    loop = {name: given[name] for name in LOOP if name in given}
    seen = config.tokens_before(config.steps)
    typer.echo(
        f"{model_config.parameter_count():,} parameters; {len(data.train.ids):,} tokens in documents: "
        f"{data.train.documents:,}; the run sees {seen:,}, {seen / len(data.train.ids):.3g} times the text",
        err=True,
    )
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    step, validation = None, None
    stops = interruptible([signal.SIGINT, signal.SIGTERM], "saving after this step; once more ends at once\n")
    with user_errors(), stops as came, Progress(*columns) as progress:
        loop["stopping"] = lambda: bool(came)
        task = progress.add_task("", total=config.steps)
        for step in run(model_config, config, data.tokenizer, data.train.ids, data.valid, out, **loop):
            line = f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s"
            validation = step.validation or validation
            if validation is not None:
                line += f"  validation {validation:.4f} bits/byte"
            progress.update(task, completed=step.step, description=line)
            if step.validation is not None or (not progress.console.is_terminal and step.step % 50 == 0):
                progress.console.print(f"step {step.step}: {line}", highlight=False)
    if "plot" in given:
        with user_errors():
            _plot(out, given["preset"], given["plot"])
    if step is not None and step.step < config.steps:
        typer.echo(
            f"stopped at step {step.step}: the model is in {out / 'model'}, and the same command goes on from there",
            err=True,
        )
        raise typer.Exit(128 + came[0])
    if step is None or validation is None:
        typer.echo(f"{out} has all of its {config.steps} steps already; the model is in {out / 'model'}")
        return
    perplexity = math.exp(validation * data.valid.nats_per_bit)
    typer.echo(f"validation: {validation:.4f} bits per byte, perplexity {perplexity:.3f}; {out / 'model'}")


def _data(given: dict[str, Any], out: Path, vocab_size: int) -> Data:
    """The run's tokens, of a tokenizer that has the entries of the model.

    Raises:
        ValueError: it has not, or as `prepare`.
    """
    from lpa_model.train.data import prepare
    from lpa_model.train.state import STATE

    source, valid = given["data"], given["valid"]
    size = max(path.stat().st_size if path.is_file() else 0 for path in (source, valid))
    try:
        with bytes_bar(size) as report:
            data = in_thread(
                lambda: prepare(source, valid, out, vocab_size, field=given.get("field", "text"), report=report)
            )
    except KeyboardInterrupt:
        typer.echo("stopped while the text was tokenized: no step is done, and the same command begins again", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if (entries := data.tokenizer.get_vocab_size()) != vocab_size:
        which = f"data: the text gives a tokenizer of {entries} entries"
        other = "more text"
        if source.is_dir():
            which, other = f"data: {source} has a tokenizer of {entries} entries", "other --data"
        elif (out / STATE).exists():
            which, other = f"out: the earlier start in {out} gives a tokenizer of {entries} entries", "another --out"
        raise ValueError(f"{which}, the model's vocab_size is {vocab_size}: give --vocab-size {entries}, or {other}")
    return data


def _changes(path: Path, config: TrainConfig) -> list[str]:
    """A line with what decides the weights and was otherwise at an earlier start."""
    if not path.is_file():
        return []
    earlier, now = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(config)
    changed = [f"{name} {earlier.get(name)}" for name in now if earlier.get(name) != now[name]]
    return [f"the earlier start in {path.parent} had {', '.join(changed)}"] if changed else []


def _plot(out: Path, preset: str, path: Path) -> None:
    from lpa_model.train.loop import METRICS
    from lpa_model.train.metrics import read_metrics
    from server.bench.plot import plot_training

    rows = read_metrics(out / METRICS)
    if rows:
        plot_training(rows, f"{Path(preset).stem} in {out}", path)
    else:
        typer.echo(f"{path}: not drawn, {out / METRICS} has no line yet", err=True)
