"""Messages to one text, by the Jinja template that a model was trained with.

The environment is Hugging Face's (sandboxed; trim_blocks, lstrip_blocks, loop controls, `raise_exception`,
`strftime_now`, a `tojson` without HTML escapes, `{% generation %}`), so that a template means here what it means there.
"""

from __future__ import annotations

import functools
import json
import secrets
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.engine.tool_syntax import as_text
from server.errors import InvalidRequest

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role in ('system', 'developer') -%}
        {{- message.content | trim ~ '\\n\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' ~ message.content | trim ~ '\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' ~ message.content | trim ~ '\\n' -}}
    {%- else -%}
        {{- raise_exception("the default template has no place for the role '" ~ message.role ~ "'") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""
"""For a base model, which only continues text: a script of two speakers, after the system's text as a paragraph."""

DEFAULT_STOP = ("\nUser:",)
"""Where an answer under DEFAULT_TEMPLATE ends: a base model would go on to speak for the user."""

RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message"})


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation, special tokens written out: encode it with add_special_tokens=False.

    Args:
        template: Jinja source.
        messages: dictionaries with `role`, `content` (a string) and what else the template reads; keys that are None
            count as absent.
        add_generation_prompt: end with what begins an answer.
        continue_final_message: end inside the last message, after its content, so that the model continues it. If the
            template trims contents, its trailing white space is gone here too.
        special_tokens: `bos_token`, `eos_token` and so on, as variables.
        tools: functions that may be called, for the template's variable `tools`. A template without it shows them in
            the system's text, and one that reads no `tool_calls` shows calls and their results as texts
            (`tool_syntax.as_text`).
        kwargs: more variables; they win over special tokens.

    Raises:
        InvalidRequest: no messages, arguments that exclude each other, or the template refuses them; the message has
            the template's line.
    """
    if not messages:
        raise InvalidRequest("messages: is empty; it must have at least one message", param="messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message: excludes add_generation_prompt, which begins a new message",
            param="continue_final_message",
        )
    if taken := RESERVED & set(kwargs or ()):
        raise InvalidRequest(
            f"chat_template_kwargs: {min(taken)} is a field of the request itself", param="chat_template_kwargs"
        )
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    content, mark = "", ""
    if continue_final_message:
        last = given[-1].get("content")
        if not isinstance(last, str):
            raise InvalidRequest("messages: the last one has no content to continue", param="messages")
        content, mark = last, secrets.token_hex(16)
        given[-1]["content"] = f"{content}{mark} "  # a template that trims takes the space away
    shows_calls = "tool_calls" in template
    if not (shows_tools(template) and shows_calls):
        given = as_text(given, () if shows_tools(template) else tools, calls=not shows_calls)
    variables = {"tools": list(tools) or None, "documents": None, **(special_tokens or {}), **(kwargs or {})}
    text = _render(template, {**variables, "messages": given, "add_generation_prompt": add_generation_prompt})
    if not continue_final_message:
        return text
    at = text.rfind(mark)
    if at < 0:
        raise InvalidRequest("messages: the chat template leaves the last message's content out", param="messages")
    trimmed = not text.startswith(f"{mark} ", at)
    trailing = len(content) - len(content.rstrip()) if trimmed and content.strip() else 0
    return text[: at - trailing].replace(f"{mark} ", "").replace(mark, "")  # a template may show contents twice


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """The template, ready to render; threads may share it.

    Raises:
        ValueError: it is no Jinja template; the message has the line.
    """
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error


@functools.lru_cache(maxsize=16)
def shows_tools(source: str) -> bool:
    """Whether a template reads the variable `tools`."""
    return "tools" in meta.find_undeclared_variables(_environment().parse(source))


def read_template(value: str) -> str:
    """The source of a template that was given as a file's path or written out.

    Raises:
        ValueError: it is neither.
    """
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {value!r} is neither a template nor a readable file: {error}") from error


def template_of(tokenizer_config: Mapping[str, Any], jinja_file: str | None) -> str | None:
    """A model folder's template: chat_template.jinja, else the `chat_template` of tokenizer_config.json, which is a
    string or a list of named ones.

    Raises:
        ValueError: it is of another form, or none of several is the default.
    """
    found = jinja_file if jinja_file is not None else tokenizer_config.get("chat_template")
    if isinstance(found, list):
        try:
            named = {str(entry["name"]): entry["template"] for entry in found}
        except (KeyError, TypeError):
            raise ValueError("tokenizer_config.json: chat_template is no list of names and templates") from None
        if "default" not in named:
            raise ValueError(
                f"tokenizer_config.json: none of the chat templates {', '.join(named)} is called default; "
                "choose one with --chat-template"
            )
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise ValueError("tokenizer_config.json: chat_template is neither a string nor a list of named ones")
    return found


def _render(template: str, variables: dict[str, Any]) -> str:
    try:
        return compile_template(template).render(variables)
    except RecursionError:
        raise InvalidRequest("messages: are nested too deeply for the chat template", param="messages") from None
    except Exception as error:  # what a template does with values that it did not expect: TypeError, KeyError, ...
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
        where = f" (line {lines[-1]} of the template)" if lines else ""
        what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise InvalidRequest(f"messages: the chat template refuses them: {what}{where}", param="messages") from error


class _Generation(Extension):
    """`{% generation %}` marks the model's own words for training; in inference it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it without ClassVar)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
