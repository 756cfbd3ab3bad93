"""Chat templates as models bring them, against texts written by hand; tests/extra compares with transformers."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from lpa_model.folder import CheckpointError
from server.engine.chat_template import DEFAULT_STOP, DEFAULT_TEMPLATE, read_template, render_chat, template_of
from server.engine.tokenizer import load_tokenizer
from server.errors import InvalidRequest
from tests.templates import CHATML, HEADERS, INST, TRIMMED
from tests.tiny import byte_tokenizer, tiny_config

TALK = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Of the sea?"},
    {"role": "assistant", "content": "Of the sea."},
    {"role": "user", "content": " Go on. "},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_chatml() -> None:
    text = render_chat(CHATML, TALK)
    assert text == (
        "<|im_start|>system\nYou tell stories.<|im_end|>\n<|im_start|>user\nOf the sea?<|im_end|>\n"
        "<|im_start|>assistant\nOf the sea.<|im_end|>\n<|im_start|>user\n Go on. <|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(CHATML, TALK, add_generation_prompt=False) == text.removesuffix("<|im_start|>assistant\n")


def test_special_tokens_are_variables_and_the_requests_own_win() -> None:
    text = render_chat(INST, TALK[1:], special_tokens=TOKENS)
    assert text == "<s>[INST] Of the sea? [/INST] Of the sea.</s><s>[INST] Go on. [/INST]"
    other = render_chat(INST, TALK[1:], special_tokens=TOKENS, kwargs={"bos_token": "<b>"})
    assert other == text.replace("<s>", "<b>")
    assert render_chat("{{ tools is none }} {{ documents }} {{ unk_token }}.", TALK) == "True None ."


def test_a_header_template() -> None:
    text = render_chat(HEADERS, TALK[:2], special_tokens={"bos_token": "<|begin|>"})
    assert text == (
        "<|begin|><|head|>system<|end_head|>\n\nYou tell stories.<|eot|><|head|>user<|end_head|>\n\nOf the sea?<|eot|>"
        "<|head|>assistant<|end_head|>\n\n"
    )


def test_the_default_is_a_script_of_two_speakers() -> None:
    assert render_chat(DEFAULT_TEMPLATE, TALK) == (
        "You tell stories.\n\nUser: Of the sea?\nAssistant: Of the sea.\nUser: Go on.\nAssistant:"
    )
    (stop,) = DEFAULT_STOP
    assert stop in render_chat(DEFAULT_TEMPLATE, TALK)
    with pytest.raises(InvalidRequest, match="'critic'"):
        render_chat(DEFAULT_TEMPLATE, [{"role": "critic", "content": "5"}])


@pytest.mark.parametrize("template", [CHATML, DEFAULT_TEMPLATE, HEADERS, TRIMMED])
@pytest.mark.parametrize("content", ["Of the", "Of the ", "\n Of\nthe\n\n", "", "the sea the sea"])
def test_the_last_message_may_be_left_open(template: str, content: str) -> None:
    talk = [TALK[1], {"role": "assistant", "content": content}]
    closed = render_chat(template, talk, add_generation_prompt=False)
    left_open = render_chat(template, talk, add_generation_prompt=False, continue_final_message=True)
    assert closed.startswith(left_open)
    shown = content if template in (CHATML, HEADERS) else content.strip()
    assert left_open.endswith(shown)
    # what was cut off is only what closes a turn
    assert closed.removeprefix(left_open) in ("<|im_end|>\n", "<|eot|>", "\n", "</s>\n")
    assert talk[1]["content"] == content  # the caller's messages are left alone


def test_a_template_that_shows_contents_twice_is_left_open_at_the_last() -> None:
    template = "{{ messages[-1].content }}|{{ messages[-1].content | trim }}|{{ messages[-1].content }}!"
    text = render_chat(template, TALK, add_generation_prompt=False, continue_final_message=True)
    assert text == " Go on. |Go on. | Go on. "


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs", "add_generation_prompt"),
        (
            {"messages": [{"role": "user"}], "continue_final_message": True, "add_generation_prompt": False},
            "messages",
            "content",
        ),
        (
            {"template": "nothing", "continue_final_message": True, "add_generation_prompt": False},
            "messages",
            "leaves",
        ),
        (
            {"template": "\n{% if true %}\n{{ raise_exception('roles must\nalternate') }}{% endif %}"},
            "messages",
            "line 3",
        ),
        ({"template": "{{ messages[0].content + 5 }}"}, "messages", "typeerror"),
        ({"template": "a\n{{ messages.append(5) }}"}, "messages", "line 2"),
        ({"template": "{{ ''.__class__.__mro__ }}"}, "messages", "unsafe"),
        ({"template": "{{ messages[0].nothing.at_all }}"}, "messages", "has no attribute 'nothing'"),
        ({"template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "messages", "deeply"),
        ({"template": "{% for i in range(10**6) %}{% endfor %}"}, "messages", "range"),
    ],
)
def test_what_a_template_refuses_is_the_requests_fault(arguments: dict[str, Any], param: str, words: str) -> None:
    given = {"template": CHATML, "messages": TALK, **arguments}
    with pytest.raises(InvalidRequest) as refused:
        render_chat(given.pop("template"), given.pop("messages"), **given)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}: ")
    assert words in refused.value.message.lower()


def test_hugging_faces_conventions() -> None:
    def one(template: str, **kwargs: Any) -> str:
        return render_chat(template, TALK, kwargs=kwargs)

    assert one("  {% if true %}\n    a\n  {% endif %}\nb\n") == "    a\nb"
    assert one("{{ x | tojson }}", x={"b": "<é>", "a": [1]}) == '{"b": "<é>", "a": [1]}'
    assert one("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert (
        one("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}") == "system"
    )
    assert one("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert one("{% generation %}{{ messages[0].role }}{% endgeneration %}!") == "system!"
    assert render_chat("{{ messages[0].name is defined }}", [{"role": "user", "name": None}]) == "False"


def folder_with(folder: Path, tokenizer: Tokenizer, config: object = None, jinja: str | None = None) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def test_a_folders_template_and_special_tokens_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = {"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "bos_token": None}
    loaded = load_tokenizer(folder_with(tmp_path, tokenizer, config), tiny_config())
    assert loaded.chat_template == CHATML
    assert loaded.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    assert loaded.chat_stop == ()
    assert loaded.render_chat(TALK) == render_chat(CHATML, TALK)
    # the newer file goes before, and the flag before both
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}\n")
    assert load_tokenizer(tmp_path, tiny_config()).render_chat(TALK) == "<|im_end|>"
    assert load_tokenizer(tmp_path, tiny_config(), "{{ 1 + 1 }}").render_chat(TALK) == "2"
    (tmp_path / "mine").write_text("of a file")
    assert load_tokenizer(tmp_path, tiny_config(), str(tmp_path / "mine")).render_chat(TALK) == "of a file"


def test_a_folder_without_a_template_has_the_default(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loaded = load_tokenizer(folder_with(tmp_path, tokenizer), tiny_config())
    assert loaded.render_chat(TALK) == render_chat(DEFAULT_TEMPLATE, TALK)
    assert loaded.chat_stop == DEFAULT_STOP
    assert loaded.special_tokens == {"eos_token": "<|endoftext|>"}  # by config.json's id


def test_of_named_templates_the_default_is_taken() -> None:
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    assert template_of({"chat_template": named}, None) == "a"
    assert template_of({}, None) is None
    for wrong in (named[:1], [{"name": "default"}], ["a"], {"default": "a"}, 5):
        with pytest.raises(ValueError, match=r"chat.template"):
            template_of({"chat_template": wrong}, None)


def test_a_broken_template_is_an_error_at_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="line 2"):
        load_tokenizer(folder_with(tmp_path, tokenizer, {"chat_template": "a\n{% if %}"}), tiny_config())
    with pytest.raises(CheckpointError, match=re.escape("tokenizer_config.json")):
        load_tokenizer(folder_with(tmp_path, tokenizer, "{"), tiny_config())
    with pytest.raises(CheckpointError, match=re.escape("tokenizer_config.json")):
        load_tokenizer(folder_with(tmp_path, tokenizer, "[]"), tiny_config())
    with pytest.raises(ValueError, match="nowhere"):
        read_template(str(tmp_path / "nowhere"))


def test_a_rendered_chat_gets_no_second_bos(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_tokenizer().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    config = {"bos_token": "<|endoftext|>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    loaded = load_tokenizer(folder_with(tmp_path, backend, config), tiny_config())
    text = loaded.render_chat([{"role": "user", "content": "ab"}])
    assert loaded.encode(text, add_special_tokens=False).count(0) == 1
    assert loaded.encode(text)[:2] == [0, 0]
