"""`lpa train`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import typer

from server.cli.command import RANK_HELP, command_of, config_of, flag, interruptible, user_errors, with_ranks

T = TypeVar("T")


def train() -> None:
    """Train a model from text, or go on with a run that was interrupted."""


def train_command() -> Any:
    """`lpa train` with a flag for every field of TrainConfig."""
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
        flag("vocab_size", int, "Entries of the tokenizer, fewer for a small text.", "the model's own"),
        flag("attention_rank", str, RANK_HELP.format("attention"), "the model's own", "N|dense"),
        flag("ffn_rank", str, RANK_HELP.format("feed-forward"), "the model's own", "N|dense"),
        flag("device", str, "cpu, cuda or cuda:N.", defaults["device"].default),
        flag("report_every", int, "Steps between reports; a GPU idles at each.", defaults["report_every"].default),
        flag("validate_every", int, "Steps between validations.", defaults["validate_every"].default),
        flag("checkpoint_every", int, "Steps between states to resume from.", defaults["checkpoint_every"].default),
        flag("compile_loss", bool, "Compile the loss with torch.compile.", defaults["compile_loss"].default),
    ]
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = next(part for part in (*get_args(kinds[field.name]), kinds[field.name]) if part is not type(None))
        parameters.append(
            flag(field.name, kind, field.metadata["help"], field.default, group="What decides the weights")
        )
    about = "Train a model from text, or go on with a run that was interrupted; ^C saves it first."
    return command_of(parameters, _train, about)


def _train(given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lpa_model.backends.features import resolve_device
    from lpa_model.train import END_OF_TEXT, TrainConfig, check_lengths, encode, prepare
    from lpa_model.train import train as run

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    out: Path = given["out"]
    with user_errors():
        model_config = with_ranks(config_of(given["preset"]), given.get("attention_rank"), given.get("ffn_rank"))
        if "vocab_size" in given:
            model_config = dataclasses.replace(model_config, vocab_size=given["vocab_size"])
        config = TrainConfig(**{name: value for name, value in given.items() if name in names})
        context = model_config.max_position_embeddings
        if config.sequence_length > context:
            raise ValueError(f"sequence_length: {config.sequence_length} is more than the model's context of {context}")
        resolve_device(given.get("device", "cpu"))  # before the text is tokenized, which takes minutes
        out.mkdir(parents=True, exist_ok=True)
        fresh = not (out / "tokens.npy").exists()
        tokenizer, tokens, valid_text = _interruptibly(
            lambda: prepare(given["data"], given["valid"], out, model_config.vocab_size)
        )
        if (entries := tokenizer.get_vocab_size()) != model_config.vocab_size:
            source = "data: the text" if fresh else f"out: the earlier start in {out}"
            other = "more text" if fresh else "another --out"
            raise ValueError(
                f"{source} gives a tokenizer of {entries} entries, the model's vocab_size is "
                f"{model_config.vocab_size}: give --vocab-size {entries}, or {other}"
            )
        num_valid_tokens = len(_interruptibly(lambda: encode(tokenizer, valid_text)))
        check_lengths(config, len(tokens), num_valid_tokens)
    model_config = dataclasses.replace(model_config, eos_token_id=tokenizer.token_to_id(END_OF_TEXT))
    own = ("device", "report_every", "validate_every", "checkpoint_every", "compile_loss")
    loop = {name: given[name] for name in own if name in given}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    step, validation = None, None
    stops = interruptible([signal.SIGINT, signal.SIGTERM], "saving after this step; once more ends at once\n")
    with user_errors(), stops as came, Progress(*columns) as progress:
        loop["stopping"] = lambda: bool(came)
        task = progress.add_task(f"{len(tokens):,} tokens of text", total=config.steps)
        for step in run(model_config, config, tokenizer, tokens, valid_text, out, **loop):
            line = f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s"
            validation = step.validation or validation
            if validation is not None:
                line += f"  validation {validation:.4f} bits/byte"
            progress.update(task, completed=step.step, description=line)
            if step.validation is not None or (not progress.console.is_terminal and step.step % 50 == 0):
                progress.console.print(f"step {step.step}: {line}", highlight=False)
    if step is not None and step.step < config.steps:
        typer.echo(
            f"stopped at step {step.step}: the model is in {out / 'model'}, and the same command goes on from there",
            err=True,
        )
        raise typer.Exit(128 + came[0])
    if step is None or validation is None:
        typer.echo(f"{out} has all of its {config.steps} steps already; the model is in {out / 'model'}")
        return
    nats = validation * math.log(2) * len(valid_text.encode()) / num_valid_tokens
    typer.echo(f"validation: {validation:.4f} bits per byte, perplexity {math.exp(nats):.3f}; {out / 'model'}")


def _interruptibly(work: Callable[[], T]) -> T:
    """The result of work that is long in libraries, where ^C would wait for its end: another thread does it."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        typer.echo("stopped while the text was tokenized: no step is done, and the same command begins again", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if failed:
        raise failed[0]
    return done[0]
