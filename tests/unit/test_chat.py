"""Chat templates against transformers, and templates that try to break out."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from pocketglm.errors import CheckpointError
from pocketglm.text.chat import read_template, render

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {{- message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# In the manner of GLM-4: a prefix, roles as tokens, tools as JSON, a namespace, break.
GLM = """\
[gMASK]<sop>
{%- if tools is not none -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{% for m in messages %}
    {% if m.role == 'tool' %}
        {% break %}
    {% endif %}
<|{{ m.role }}|>
{{ m.content }}{% if loop.index0 == ns.last and not enable_thinking %}/nothink{% endif %}

{% endfor %}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""

MESSAGES = [
    {"role": "user", "content": " What is <b>2 & 2</b>? "},
    {"role": "assistant", "content": "四"},
    {"role": "user", "content": "And 'three'?"},
]
TOOLS = [{"type": "function", "function": {"name": "打开", "description": "a < b & 'c'"}}]


@pytest.fixture(scope="module")
def theirs() -> Any:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("template", [CHATML, GLM])
def test_the_text_is_that_of_transformers(
    theirs: Any, template: str, system: bool, tools: Any, prompt: bool
) -> None:
    messages = [{"role": "system", "content": "Be brief."}] * system + MESSAGES
    expected = theirs.apply_chat_template(
        messages,
        chat_template=template,
        tools=tools,
        add_generation_prompt=prompt,
        enable_thinking=False,
        tokenize=False,
    )
    got = render(
        template, messages, add_generation_prompt=prompt, tools=tools, enable_thinking=False
    )
    assert got == expected


def test_a_json_filter_with_options_as_in_transformers(theirs: Any) -> None:
    template = "{{ messages | tojson(indent=2, sort_keys=True) }}"
    expected = theirs.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    assert render(template, MESSAGES) == expected


def test_names_reach_the_template() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}", MESSAGES[1:], bos_token="<s>") == (
        "<s>四"
    )


def test_optional_inputs_are_none_and_not_undefined() -> None:
    template = "{{ tools is none }} {{ documents is none }} {{ bos_token is defined }}"
    assert render(template, []) == "True True False"


def test_today() -> None:
    before = datetime.datetime.now().strftime("%Y-%m-%d")
    got = render("{{ strftime_now('%Y-%m-%d') }}", [])
    assert got in (before, datetime.datetime.now().strftime("%Y-%m-%d"))


# --- templates are data from a download ---------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include 'etc/passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_tricks_are_refused(template: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(CheckpointError, match="chat template fails to render") as caught:
        render(template, messages)
    assert "--raw" in caught.value.hint
    assert messages == MESSAGES


def test_a_template_can_refuse_the_messages() -> None:
    template = (
        "{% if messages[0].role != 'system' %}"
        "{{ raise_exception('the first message must be a system message') }}{% endif %}"
    )
    with pytest.raises(CheckpointError, match="the first message must be a system message"):
        render(template, MESSAGES)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ messages | nofilter }}", "nofilter"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[0].content | round }}", "round"),
    ],
)
def test_a_broken_template_is_an_input_error(template: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        render(template, MESSAGES)
    assert words in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("template", ["", "\n", "{% if tools %}x{% endif %}"])
def test_a_template_that_says_nothing(template: str) -> None:
    with pytest.raises(CheckpointError, match="makes no text") as caught:
        render(template, MESSAGES)
    assert "--raw" in caught.value.hint


# --- where templates lie ------------------------------------------------------------------------


def config(folder: Path, value: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))


def test_no_template(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_template(tmp_path) is None


def test_template_in_the_config_or_in_its_own_file(tmp_path: Path) -> None:
    config(tmp_path, "in the config")
    assert read_template(tmp_path) == "in the config"
    (tmp_path / "chat_template.jinja").write_text("自己的文件", encoding="utf-8")
    assert read_template(tmp_path) == "自己的文件"  # transformers prefers it too


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (["odd", {"name": "default", "template": "d"}], "d"),
        ([{"name": "default"}], None),
        ({"odd": 1}, None),
        (None, None),
    ],
)
def test_named_templates(tmp_path: Path, value: object, expected: str | None) -> None:
    config(tmp_path, value)
    assert read_template(tmp_path) == expected


def test_a_template_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8") as error:
        read_template(tmp_path)
    assert error.value.hint
