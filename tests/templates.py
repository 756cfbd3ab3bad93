"""Chat templates in the styles that published models use, for several test files."""

from __future__ import annotations

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# the second generation of Llama: turns in brackets, the system's text inside the first one
INST = """\
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 is even) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ turn.content.strip() ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ turn.content.strip() ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""

# the third: a header before each message
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|end_head|>\\n\\n' + message.content + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|end_head|>\\n\\n' }}
{%- endif %}
"""

# Zephyr: newlines of the template itself, trimmed contents
TRIMMED = """\
{% for message in messages %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
