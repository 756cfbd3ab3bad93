"""The grammar of an answer that may or must call functions: text, or calls whose arguments follow their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from server.engine.request import GrammarSpec
from server.engine.tool_syntax import SYNTAXES, CallSyntax, literal_tokens, split_at

MAX_CALLS = 16  # of one answer; a small model would go on until its max_tokens

LARK = r"""
ANY: /(.|\n)*/
CALL: %s
TEXT: /(.|\n)+/ & ~CALL
"""


@dataclass(frozen=True)
class Function:
    """One that may be called; errors name its schema as the request's field and `where`, such as
    "[3].function.parameters"."""

    name: str
    parameters: Mapping[str, Any] | None  # JSON schema of an object; None: no arguments
    strict: bool  # every property is required, and no other may come
    where: str


@dataclass(frozen=True)
class ToolChoice:
    """What an answer may be: text or calls (auto), calls (required), or one call of the only function (named)."""

    mode: Literal["auto", "required", "named"]
    functions: tuple[Function, ...]
    parallel: bool = True

    @property
    def most(self) -> int:
        """Calls of one answer."""
        return MAX_CALLS if self.parallel and self.mode != "named" else 1


def tool_spec(
    choice: ToolChoice,
    syntax: CallSyntax,
    special_tokens: Mapping[str, int],
    *,
    param: str = "tools",
    text: GrammarSpec | None = None,
) -> GrammarSpec:
    """What the generated text must match.

    Args:
        special_tokens: ids of the vocabulary's special tokens by name.
        param: the request's field that has the functions.
        text: schema of an answer that is no call, with mode auto (default: any text).
    """
    described = {
        "syntax": syntax.name,
        "auto": choice.mode == "auto",
        "most": choice.most,
        "tokens": literal_tokens(syntax, special_tokens),
        "functions": [asdict(function) for function in choice.functions],
        "text": None if text is None or choice.mode != "auto" else asdict(text),
    }
    return GrammarSpec("tools", json.dumps(described, ensure_ascii=False, separators=(",", ":")), param)


def lark_source(described: Mapping[str, Any], schemas: Sequence[str], text: str | None) -> str:
    """Lark of what `tool_spec` describes, with the functions' schemas and that of a text, ready to be compiled."""
    syntax, tokens, most = SYNTAXES[described["syntax"]], described["tokens"], described["most"]
    names = [function["name"] for function in described["functions"]]
    several = most > 1 and syntax.separator is not None

    def literal(written: str) -> str:
        pieces = split_at(written, list(tokens))
        return " ".join(f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece) for piece in pieces)

    def any_call(before: str) -> str:
        """A call of any function, with `before` in front of its name, as far as its arguments."""
        beginnings = (literal(f"{before}{name}{syntax.middle}") for name in names)
        return " | ".join(f"{beginning} arguments_{number}" for number, beginning in enumerate(beginnings))

    prefix = f"<[{tokens[syntax.prefix]}]>? " if syntax.prefix in tokens else ""
    begin, trigger = syntax.begin, json.dumps(syntax.trigger)
    if not described["auto"]:
        lines = [f"start: {prefix}calls"]
    elif text is not None:
        lines = [f"start: text | {prefix}calls", f"text: %json {text}"]
    elif not syntax.after_text:
        lines = [f"start: TEXT? | {prefix}calls", LARK % f"{trigger} ANY"]
    else:
        begin = begin.removeprefix(syntax.trigger)
        texts = LARK % f"ANY {trigger} ANY"
        if syntax.trigger in tokens:  # no text has a special token; one that has its name would be read as a call
            lines = ["start: TEXT? | TEXT? begin calls", texts, f"begin: {literal(syntax.trigger)}"]
        else:
            lines = ["start: TEXT? | begin calls", texts, f"begin[lazy]: ANY {trigger}"]
    further = f" further{{0,{most - 1}}}" if several else ""
    lines.append(f"calls: ({any_call(begin)}){further} {literal(syntax.end)}")
    lines += [f"arguments_{number}: %json {schema}" for number, schema in enumerate(schemas)]
    if several:
        lines.append(f"further: {any_call(syntax.between)}")
    return "\n".join(lines)
