"""Chat templates (`chat_template` in tokenizer_config.json, or chat_template.jinja), torch-free."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.errors import CheckpointError

Message = Mapping[str, str]
_FIX = (
    "fix chat_template.jinja, or chat_template in tokenizer_config.json, or pass the prompt with "
    "--raw"
)


def read_template(folder: Path) -> str | None:
    """The folder's chat template, or None.

    Raises:
        CheckpointError: its file cannot be read.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8: {error}", "download it again") from error
    config = folder / "tokenizer_config.json"
    value = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(value, list):  # several named templates: the default one
        named = [t for t in value if isinstance(t, dict)]
        value = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def render(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **names: Any
) -> str:
    """The prompt text of a conversation. Runs sandboxed: a template is data from a download.

    `names` are the template's other variables: bos_token, eos_token, tools, enable_thinking...
    Filters and functions are those that transformers gives a template.

    Raises:
        CheckpointError: the template does not parse, refuses the messages, or makes no text of
            them.
    """

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    names = {"tools": None, "documents": None, **names}
    try:
        text = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **names
        )
    except Exception as error:  # a template is a program: 1/0, a missing key, endless recursion
        raise CheckpointError(f"the chat template fails to render: {error}", _FIX) from error
    if not text:
        raise CheckpointError("the chat template makes no text of the messages", _FIX)
    return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja2's own, escapes no HTML: the model was trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
