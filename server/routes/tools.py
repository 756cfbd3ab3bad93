"""Answers that may call functions: how they are generated, and why they ended."""

from __future__ import annotations

from dataclasses import replace

from server.engine.request import SamplingParams
from server.engine.tokenizer import Tokenizer
from server.engine.tool_grammar import ToolChoice, tool_spec
from server.engine.tool_reader import ToolReader
from server.engine.tool_syntax import literal_tokens


def with_tools(
    params: SamplingParams, choice: ToolChoice, tokenizer: Tokenizer, *, param: str = "tools"
) -> SamplingParams:
    """Sampling under the grammar of `choice`; a JSON schema that the parameters have is that of an answer without
    calls. `param` is the request's field that has the functions.

    A model that was not trained to call functions does not know when it has called enough: its calls are one.
    """
    syntax, special = tokenizer.call_syntax, tokenizer.special_by_name
    choice = replace(choice, parallel=choice.parallel and tokenizer.shows_tools)
    return replace(
        params,
        grammar=tool_spec(choice, syntax, special, param=param, text=params.grammar),
        # the reader finds calls by the tokens that begin them
        skip_special_tokens=params.skip_special_tokens and not literal_tokens(syntax, special),
    )


def finish_reason(choice: ToolChoice, reader: ToolReader, reason: str) -> str:
    """OpenAI's: `tool_calls` for calls that are complete, but `stop` for a function that the request names."""
    called = reason == "stop" and reader.complete and choice.mode != "named"
    return "tool_calls" if called else reason
