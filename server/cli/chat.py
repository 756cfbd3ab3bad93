"""`lpa chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.command import Dtype, Model, Weights, ends_at_once, interruptible, user_errors

if TYPE_CHECKING:
    from server.llm import LLM, SamplingParams

Messages = list[dict[str, str]]


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja file, or the template itself.", show_default="LPA_CHAT_TEMPLATE, or the model's own"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.", show_default="what the context leaves")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the most probable token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="random")] = None,
    dtype: Dtype = None,
    weights: Weights = None,
) -> None:
    """Talk with a model, a line at a time, in the form of its chat template; ^C ends an answer, ^D the conversation."""
    from server.llm import LLM, SamplingParams

    with user_errors():
        with ends_at_once():
            llm = LLM(model, dtype=dtype, weights=weights, chat_template=chat_template, max_num_seqs=1)
        with llm:
            if llm.tokenizer.chat_stop:
                _note(f"{llm.name} has no chat template: it continues a script of User: and Assistant:")
            params = SamplingParams(
                temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(llm.tokenizer.chat_stop)
            )
            messages: Messages = [{"role": "system", "content": system}] if system else []
            for line in _lines():
                _answer(llm, messages, line, params, max_tokens)


def _lines() -> Iterator[str]:
    """What the user says, empty lines left out; until ^D, or ^C at the prompt."""
    import readline  # noqa: F401  # input() edits lines and has a history with it

    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                typer.echo()
            return
        if line.strip():
            yield line


def _answer(llm: LLM, messages: Messages, line: str, params: SamplingParams, max_tokens: int | None) -> None:
    """Print the answer as it comes; both are appended to the messages, whose oldest go where the context is full."""
    messages.append({"role": "user", "content": line})
    num_fixed = 1 if messages[0]["role"] == "system" else 0
    while len(ids := _prompt(llm, messages)) + (max_tokens or 1) > llm.max_model_len:
        if len(messages) <= num_fixed + 1:
            messages.pop()
            _note(
                f"the message is too long: with {len(ids)} tokens, and {max_tokens or 1} of an answer, it does not fit "
                f"the context of {llm.max_model_len}"
            )
            return
        del messages[num_fixed : num_fixed + 2]
        _note(f"the context of {llm.max_model_len} tokens is full: the oldest message and its answer are left out")
    params = replace(params, max_tokens=max_tokens or llm.max_model_len - len(ids))
    text = ""
    with interruptible([signal.SIGINT]) as came:
        for output in llm.stream(ids, params):
            print(output.text, end="", flush=True)
            text += output.text
            if came:
                break
    print()
    messages.append({"role": "assistant", "content": text})


def _prompt(llm: LLM, messages: Messages) -> list[int]:
    return llm.tokenizer.encode(llm.tokenizer.render_chat(messages), add_special_tokens=False)


def _note(text: str) -> None:
    typer.echo(text, err=True)
