"""Calls of functions in a model's text: the grammars of each syntax, and the reader that takes the text apart."""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from server.engine.chat_template import DEFAULT_TEMPLATE, render_chat
from server.engine.grammar_source import source_of, try_out
from server.engine.request import GrammarSpec
from server.engine.tool_grammar import MAX_CALLS, Function, ToolChoice, tool_spec
from server.engine.tool_reader import ToolReader
from server.engine.tool_syntax import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, SYNTAXES, CallSyntax, as_text, syntax_of
from server.engine.vocabulary import Vocabulary
from server.errors import InvalidRequest
from tests.tiny import byte_tokenizer

SKY = Function(
    "sky",
    {
        "type": "object",
        "properties": {"at": {"enum": ["sea", "land"]}, "days": {"type": "integer"}},
        "required": ["at"],
    },
    False,
    "[0].function.parameters",
)
SKY_2 = Function("sky_2", None, True, "[1].function.parameters")
NAMES = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


@functools.cache
def special_tokenizer() -> Tokenizer:
    """The byte tokenizer with the special tokens of calls after its own."""
    found = Tokenizer.from_str(byte_tokenizer().to_str())
    found.add_special_tokens([AddedToken(name, special=True) for name in NAMES])
    return found


@functools.cache
def vocabulary(special: bool) -> tuple[Tokenizer, llguidance.LLTokenizer]:
    backend = special_tokenizer() if special else byte_tokenizer()
    alphabet = {value: index for index, value in _byte_alphabet().items()}
    raw = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    ids = [i for i, name in enumerate(raw) if i in backend.get_added_tokens_decoder()]
    tokens = [name.encode() if i in ids else bytes(alphabet[c] for c in name) for i, name in enumerate(raw)]
    return backend, Vocabulary(backend, tokens, ids, 0).native()


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}


def spec_of(choice: ToolChoice, syntax: CallSyntax, special: bool, text: GrammarSpec | None = None) -> GrammarSpec:
    tokens = {name: special_tokenizer().token_to_id(name) for name in NAMES} if special else {}
    return tool_spec(choice, syntax, tokens, text=text)


def matches(spec: GrammarSpec, text: str, special: bool) -> bool:
    """Whether the whole text follows the grammar and may end there."""
    backend, native = vocabulary(special)
    matcher = llguidance.LLMatcher(native, source_of(spec), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = backend.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


def written(syntax: CallSyntax, *calls: tuple[str, str]) -> str:
    """Calls as the templates of models write them, one syntax at a time."""
    name = "parameters" if syntax is LLAMA else "arguments"
    objects = [f'{{"name": "{call}", "{name}": {arguments}}}' for call, arguments in calls]
    if syntax is HERMES:
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    if syntax is MISTRAL:
        return f"[TOOL_CALLS] [{', '.join(objects)}]"
    if syntax is MISTRAL_ARGS:
        return "".join(f"[TOOL_CALLS]{call}[ARGS]{arguments}" for call, arguments in calls)
    return ";".join(objects)


SEA, EMPTY = ("sky", '{"at": "sea"}'), ("sky_2", "{}")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=list(SYNTAXES))
def test_a_grammar_holds_answers_to_what_was_chosen(syntax: CallSyntax, special: bool) -> None:
    several, calls_after_text = syntax is not LLAMA, syntax is not LLAMA
    both = (SKY, SKY_2)
    one, two = written(syntax, SEA), written(syntax, SEA, EMPTY)
    for mode, parallel, functions, text, expected in (
        ("auto", True, both, "", True),
        ("auto", True, both, 'Say: {"a": [1, 2]} <tool or so', True),
        ("auto", True, both, one, True),
        ("auto", True, both, two, several),
        ("auto", False, both, two, False),
        ("auto", True, both, f"Let me see.\n{one}", True),  # text of which no call is read, where it must come first
        ("auto", True, both, f"{one} So be it.", False),
        ("auto", True, both, written(syntax, ("moon", "{}")), False),
        ("required", True, both, "", False),
        ("required", True, both, "Let me see.", False),
        ("required", True, both, one, True),
        ("required", True, both, written(syntax, EMPTY), True),
        ("required", True, both, two, several),
        ("required", False, both, two, False),
        ("required", True, both, f"Let me see.\n{one}", False),
        ("required", True, both, written(syntax, *[EMPTY] * MAX_CALLS), several),
        ("required", True, both, written(syntax, *[EMPTY] * (MAX_CALLS + 1)), False),
        ("named", True, (SKY,), one, True),
        ("named", True, (SKY,), written(syntax, EMPTY), False),
        ("named", True, (SKY,), written(syntax, SEA, SEA), False),
        ("required", True, both, written(syntax, ("sky", '{"at": "sea", "days": 123456789012345}')), True),
        ("required", True, both, written(syntax, ("sky", '{"at": "sea", "days": 12345678901234567}')), False),
        ("required", True, both, written(syntax, ("sky", '{"at": "moon"}')), False),
        ("required", True, both, written(syntax, ("sky", "{}")), False),
        ("required", True, both, written(syntax, ("sky", '{"at": "sea", "made_up": 1}')), False),
        ("required", True, both, written(syntax, ("sky_2", '{"made_up": 1}')), False),
    ):
        spec = spec_of(ToolChoice(mode, functions, parallel), syntax, special)  # type: ignore[arg-type]
        assert matches(spec, text, special) == expected, (mode, text)
        reader = ToolReader(syntax)
        reader.feed(text, last=True)
        if expected and mode != "auto":
            assert reader.complete and not reader.content
        if text.startswith("Let me") and mode == "auto":
            assert (len(reader.calls), reader.content) == ((1, "Let me see.") if calls_after_text else (0, text))


def test_a_text_beside_calls_may_have_a_schema() -> None:
    for kind, form, good, bad in (
        ("json_schema", {"type": "object", "properties": {"a": {"type": "boolean"}}}, '{"a": true}', '{"a": 1}'),
        ("json_object", {}, '{"a": [1.5]}', "[]"),
    ):
        text = GrammarSpec(kind, json.dumps(form), "response_format")  # type: ignore[arg-type]
        spec = spec_of(ToolChoice("auto", (SKY,)), HERMES, False, text)
        assert matches(spec, good, False) and matches(spec, written(HERMES, SEA), False)
        assert not matches(spec, bad, False) and not matches(spec, "Hello", False)


@pytest.mark.parametrize(
    ("parameters", "strict", "says"),
    [
        ({"type": "array"}, False, "must be a JSON schema of type 'object', not 'array'"),
        ({"properties": {"a": {"type": "colour"}}}, False, "at /properties/a: Invalid type"),
        (
            {"properties": {"a": {"type": "object", "additionalProperties": True}}},
            True,
            "at /properties/a: 'additional",
        ),
    ],
)
def test_an_error_names_the_function(parameters: dict[str, Any], strict: bool, says: str) -> None:
    wrong = Function("wrong", parameters, strict, "[2].function.parameters")
    spec = spec_of(ToolChoice("auto", (SKY, SKY_2, wrong)), HERMES, False)
    with pytest.raises(InvalidRequest) as raised:
        try_out(vocabulary(False)[1], spec)
    assert raised.value.param == "tools[2].function.parameters"
    assert raised.value.message.startswith("tools[2].function.parameters: ")
    assert says in raised.value.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text('ab"\\{}[]<>:, \né', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\{}', max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "sky", "sky_2-x"]), st.dictionaries(st.text('a"}\\', max_size=4), VALUES, max_size=3)
    ),
    max_size=3,
)


@given(
    syntax=st.sampled_from(list(SYNTAXES.values())),
    text=st.text('a <tool_c>{"name\n', max_size=20),
    calls=CALLS,
    indent=st.sampled_from([None, 1]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_a_reader_takes_apart_what_was_put_together(
    syntax: CallSyntax,
    text: str,
    calls: list[tuple[str, dict[str, Any]]],
    indent: int | None,
    cuts: list[int],
) -> None:
    if syntax is LLAMA:
        calls, text = calls[:1], "" if calls else text
    given_calls = [(name, json.dumps(arguments, indent=indent)) for name, arguments in calls]
    whole = text + (written(syntax, *given_calls) if calls else "")
    reader = ToolReader(syntax)
    content, names, pieces = "", dict[int, str](), dict[int, str]()
    places = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    for start, end in zip(places, [*places[1:], len(whole)], strict=True):
        new, deltas = reader.feed(whole[start:end])
        content += new
        assert len({delta.index for delta in deltas}) == len(deltas)
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(names)
                names[delta.index] = delta.name
            pieces[delta.index] = pieces.get(delta.index, "") + delta.arguments
    content += reader.feed("", last=True)[0]
    assert [(names[i], pieces[i]) for i in names] == given_calls
    assert [(call.name, call.arguments) for call in reader.calls] == given_calls
    assert content == reader.content == (text.rstrip() if calls else text)
    assert reader.complete == bool(calls)
    assert len({call.id for call in reader.calls}) == len(calls)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=list(SYNTAXES))
def test_a_call_that_is_cut_off_is_delivered_as_far_as_it_goes(syntax: CallSyntax) -> None:
    whole = written(syntax, ("sky", '{"at": "sea"}'))
    for end in range(len(whole)):
        reader = ToolReader(syntax)
        content, _ = reader.feed(whole[:end], last=True)
        assert not reader.complete or whole[end:] == "", whole[:end]
        found = "".join(f"{call.name} {call.arguments}" for call in reader.calls)
        assert 'sky {"at": "sea"}'.startswith(found)
        assert content == ("" if len(whole[:end]) >= len(syntax.begin) else whole[:end])


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (DEFAULT_TEMPLATE, HERMES),
        ('{%- for t in tools %}{{ t | tojson }}{% endfor %}{{ \'<tool_call>\\n{"name": "\' }}', HERMES),
        ('{{ \'{"name": "\' ~ c.name ~ \'", "parameters": \' ~ c.arguments | tojson }}', LLAMA),
        ("{{ '[TOOL_CALLS] [' ~ c | tojson ~ ']' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' ~ c.name ~ '[ARGS]' ~ c.arguments | tojson }}", MISTRAL_ARGS),
    ],
)
def test_the_syntax_is_that_of_the_template(template: str, syntax: CallSyntax) -> None:
    assert syntax_of(template) is syntax
    assert len(syntax.new_id()) == (9 if syntax in (MISTRAL, MISTRAL_ARGS) else 29)


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "sky", "arguments": {"at": at}}} for at in ("sea", "land")],
    },
    {"role": "tool", "tool_call_id": "1", "content": "calm"},
    {"role": "tool", "tool_call_id": "2", "content": "rain"},
    {"role": "user", "content": "So?"},
]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]


def test_a_template_without_tools_shows_them_as_text() -> None:
    text = render_chat(DEFAULT_TEMPLATE, TALK, tools=TOOLS)
    description, rest = text.split("\n\nUser: Weather?\n")
    assert '\n{"name": "sky", "parameters": {"type": "object"}}\n' in description
    assert '<tool_call>\n{"name": "NAME' not in rest
    assert rest == (
        'Assistant: <tool_call>\n{"name": "sky", "arguments": {"at": "sea"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sky", "arguments": {"at": "land"}}\n</tool_call>\n'
        "User: <tool_response>\ncalm\n</tool_response>\n<tool_response>\nrain\n</tool_response>\nUser: So?\nAssistant:"
    )
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    assert render_chat(DEFAULT_TEMPLATE, system, tools=TOOLS) == f"Be brief.\n\n{text}"
    assert render_chat(DEFAULT_TEMPLATE, TALK) == f"User: Weather?\n{rest}"
    assert TALK[1]["tool_calls"] and TALK[2]["role"] == "tool"  # the caller's are left alone


def test_each_thing_that_a_template_does_not_show_becomes_text() -> None:
    only_tools = "{{ tools | length }}{% for m in messages %}|{{ m.role }}:{{ m.content }}{% endfor %}"
    assert render_chat(only_tools, TALK, tools=TOOLS).startswith("1|user:Weather?|assistant:<tool_call>")
    only_calls = "{% for m in messages %}|{{ m.role }}:{{ m.tool_calls | length }}{% endfor %}"
    assert render_chat(only_calls, TALK, tools=TOOLS) == "|system:0|user:0|assistant:2|tool:0|tool:0|user:0"
    assert as_text(TALK, (), calls=False) == TALK
