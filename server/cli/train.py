"""`lpa train`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from server.cli.command import RANK_HELP, config_of, flag, run_with_flags, user_errors, with_ranks


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
        if field.default is dataclasses.MISSING:
            parameters.append(required(field.name, kind, ""))
        else:
            parameters.append(flag(field.name, kind, "", field.default))
    about = "Train a model from text, or go on with a run that was interrupted."
    run_with_flags(context, parameters, _train, f"{about}\n\n{inspect.getdoc(TrainConfig)}")


def _train(given: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lpa_model.backends.features import resolve_device
    from lpa_model.train import END_OF_TEXT, TrainConfig, encode, prepare
    from lpa_model.train import train as run

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    out: Path = given["out"]
    with user_errors():
        model_config = with_ranks(config_of(given["preset"]), given.get("attention_rank"), given.get("ffn_rank"))
        config = TrainConfig(**{name: value for name, value in given.items() if name in names})
        context = model_config.max_position_embeddings
        if config.sequence_length > context:
            raise ValueError(f"sequence_length: {config.sequence_length} is more than the model's context of {context}")
        resolve_device(given.get("device", "cpu"))  # before the text is tokenized, which takes minutes
        out.mkdir(parents=True, exist_ok=True)
        tokenizer, tokens, valid_text = prepare(given["data"], given["valid"], out, model_config.vocab_size)
        if tokenizer.get_vocab_size() != model_config.vocab_size:
            raise ValueError(
                f"data: the text yields a tokenizer of {tokenizer.get_vocab_size()} entries only, the model's "
                f"vocab_size is {model_config.vocab_size}"
            )
    model_config = dataclasses.replace(model_config, eos_token_id=tokenizer.token_to_id(END_OF_TEXT))
    own = ("device", "report_every", "validate_every", "checkpoint_every", "compile_loss")
    loop = {name: given[name] for name in own if name in given}
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
