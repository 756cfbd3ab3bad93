"""`lpa generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from server.cli.command import Dtype, Model, Weights, ends_at_once, user_errors


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the most probable token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="random")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    dtype: Dtype = None,
    weights: Weights = None,
) -> None:
    """Continue a text; the continuation streams to the terminal."""
    from server.llm import LLM, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    with user_errors():
        with ends_at_once():
            llm = LLM(model, dtype=dtype, weights=weights, max_num_seqs=1)
        with llm:
            for output in llm.stream(sys.stdin.read() if prompt == "-" else prompt, params):
                print(output.text, end="", flush=True)
    print()
