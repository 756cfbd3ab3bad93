"""Rendered chats against transformers' own apply_chat_template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.chat_template import DEFAULT_TEMPLATE
from server.engine.tokenizer import load_tokenizer
from tests.templates import CHATML, HEADERS, INST, TRIMMED
from tests.tiny import byte_tokenizer, tiny_config

EVERYTHING = """\
{% set ns = namespace(count=0) %}
{%- for m in messages if m.role != 'system' %}
  {% if loop.first %}
    {{ strftime_now('%Y') ~ unk_token ~ eos_token }}
  {% endif %}
  {% set ns.count = ns.count + 1 %}
  {{ m | tojson }}{{ m.content[:3] | upper }}
  {% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}
  {% if ns.count > 3 %}{% break %}{% endif %}
  {# not shown #}
{%- endfor %}
{{ tools }}{{ documents }}{{ flag is defined and flag }}{{ {'a': '<&>'} | tojson(indent=2) }}
"""

TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <|im_end|> & good-bye\n"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Ça va ? 你好 🙂"},
        {"role": "assistant", "content": "  Yes: 'well'.\n\n"},
        {"role": "user", "content": "{{ messages }}", "name": None},
        {"role": "assistant", "content": "Going on and on "},
    ],
]


@pytest.mark.parametrize("template", [CHATML, INST, HEADERS, TRIMMED, DEFAULT_TEMPLATE, EVERYTHING])
@pytest.mark.parametrize("talk", TALKS, ids=["one", "five"])
@pytest.mark.parametrize("form", ["plain", "prompted", "continued"])
@pytest.mark.parametrize("kwargs", [{}, {"flag": True, "bos_token": "<other>"}], ids=["bare", "kwargs"])
def test_a_chat_is_rendered_as_transformers_does(
    tmp_path: Path, template: str, talk: list[dict[str, Any]], form: str, kwargs: dict[str, Any]
) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<|endoftext|>", eos_token="</s>", chat_template=template
    )
    oracle.save_pretrained(tmp_path)  # our reader takes what transformers writes
    ours = load_tokenizer(tmp_path, tiny_config(vocab_size=400))
    assert ours.chat_template == template
    how = {"add_generation_prompt": form == "prompted", "continue_final_message": form == "continued"}
    expected = oracle.apply_chat_template(talk, tokenize=False, **how, **kwargs)
    text = ours.render_chat(talk, kwargs=kwargs, **how)
    # EVERYTHING shows contents twice, and transformers leaves its mark in the first
    assert text == expected.replace("CONTINUE_FINAL_MESSAGE_TAG ", "")
    if not kwargs and text == expected:
        ids = oracle.apply_chat_template(talk, return_dict=False, **how)
        assert ours.encode(text, add_special_tokens=False) == ids
