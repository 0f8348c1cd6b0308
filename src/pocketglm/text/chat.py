"""Chat templates (`chat_template` in tokenizer_config.json, or chat_template.jinja), torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.errors import CheckpointError

Message = Mapping[str, str]


def read_template(folder: Path) -> str | None:
    """The folder's chat template, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    value = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(value, list):  # several named templates: the default one
        value = next((t.get("template") for t in value if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def render(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **names: Any
) -> str:
    """The prompt text of a conversation. Runs sandboxed: a template is data from a download.

    Raises:
        CheckpointError: the template does not parse or refuses the messages.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **names
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the chat template fails to render: {error}",
            "fix chat_template in tokenizer_config.json, or pass the prompt with --raw",
        ) from error
