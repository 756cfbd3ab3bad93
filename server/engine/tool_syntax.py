"""How models write calls of functions in their text, and what a template that knows no tools shows instead of them."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallSyntax:
    """`opening`, the calls with `separator` between them, `closing`; a call is head, name, middle, arguments, tail.

    `trigger` is the beginning of opening and head at which text has become a call. The arguments are a JSON object.
    """

    name: str
    trigger: str
    head: str
    middle: str
    tail: str
    opening: str = ""
    closing: str = ""
    separator: str | None = None  # None: one call for each answer
    after_text: bool = True  # else text that does not begin with the trigger has no calls
    prefix: str = ""  # may come before the opening, where the vocabulary has it as a token
    short_ids: bool = False  # nine letters and digits, which the template demands

    @property
    def begin(self) -> str:
        """What stands before the first name."""
        return self.opening + self.head

    @property
    def between(self) -> str:
        """What stands between the arguments of one call and the name of the next."""
        return self.tail + (self.separator or "") + self.head

    @property
    def end(self) -> str:
        """What stands after the last arguments."""
        return self.tail + self.closing

    def new_id(self) -> str:
        """A fresh id of a call."""
        length = 9 if self.short_ids else 24
        text = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))
        return text if self.short_ids else f"call_{text}"


HERMES = CallSyntax(
    "hermes",
    trigger="<tool_call>",
    head='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    tail="}\n</tool_call>",
    separator="\n",
)
LLAMA = CallSyntax(
    "llama",
    trigger='{"name": "',
    head='{"name": "',
    middle='", "parameters": ',
    tail="}",
    after_text=False,
    prefix="<|python_tag|>",
)
MISTRAL = CallSyntax(
    "mistral",
    trigger="[TOOL_CALLS]",
    opening="[TOOL_CALLS] [",
    head='{"name": "',
    middle='", "arguments": ',
    tail="}",
    separator=", ",
    closing="]",
    short_ids=True,
)
MISTRAL_ARGS = CallSyntax(
    "mistral-args",
    trigger="[TOOL_CALLS]",
    head="[TOOL_CALLS]",
    middle="[ARGS]",
    tail="",
    separator="",
    short_ids=True,
)
SYNTAXES = {syntax.name: syntax for syntax in (HERMES, LLAMA, MISTRAL, MISTRAL_ARGS)}


def syntax_of(template: str) -> CallSyntax:
    """The call syntax that a chat template shows; HERMES where it shows none that is known."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" not in template and '"parameters": ' in template and '{"name": ' in template:
        return LLAMA
    return HERMES


def as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, calls: bool
) -> list[dict[str, Any]]:
    """Messages for a template that cannot show tools: `tools` are described in the system's text, in front.

    With `calls`, the calls of assistants are written into their contents, in the syntax HERMES, and what tools
    answered becomes a message of the user.
    """
    shown: list[dict[str, Any]] = []
    for message in messages:
        kept = dict(message)
        if calls and kept.get("tool_calls"):
            written = "\n".join(_call(call["function"]) for call in kept.pop("tool_calls"))
            kept["content"] = f"{kept['content']}\n{written}" if kept.get("content") else written
        if calls and kept["role"] == "tool":
            text = f"<tool_response>\n{kept['content']}\n</tool_response>"
            if shown and shown[-1]["role"] == "tool":
                shown[-1]["content"] += f"\n{text}"
                continue
            kept = {"role": "tool", "content": text}
        shown.append(kept)
    for message in shown:
        if calls and message["role"] == "tool":
            message["role"] = "user"
    if not tools:
        return shown
    description = describe(tools)
    if shown[0]["role"] in ("system", "developer"):
        shown[0]["content"] = f"{shown[0]['content']}\n\n{description}"
        return shown
    return [{"role": "system", "content": description}, *shown]


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The default text about functions, for models whose template has none."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = f"{HERMES.head}NAME{HERMES.middle}ARGUMENTS{HERMES.tail}"
    return (
        f"You can call these functions, one in each line, with parameters as a JSON schema:\n{lines}\n\n"
        f"To call a function, answer with its name and an object of arguments, and nothing else:\n{example}\n"
        "Its result comes in the next message. Where no function helps, answer in plain text."
    )


def literal_tokens(syntax: CallSyntax, tokens: Mapping[str, int]) -> dict[str, int]:
    """Of special tokens by name, those that the syntax is written with."""
    written = "".join((syntax.prefix, syntax.opening, syntax.head, syntax.middle, syntax.tail, syntax.closing))
    return {name: token for name, token in tokens.items() if name in written}


def split_at(text: str, names: Sequence[str]) -> list[str]:
    """The text in pieces, each of which is one of `names` or has none of them."""
    if not names:
        return [text] if text else []
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, names))})", text) if piece]


def _call(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f"{HERMES.head}{function['name']}{HERMES.middle}{arguments}{HERMES.tail}"
