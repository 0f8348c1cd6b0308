"""Licence and base model of a downloaded folder, to be carried through every later step."""

from __future__ import annotations

from pathlib import Path

import yaml

from pocketglm.artifacts.checkpoint import read_json


def origin_of(folder: Path) -> dict[str, str]:
    """`license` and `base_model`, where the folder's model card or config says so.

    The card is README.md with a YAML head, as model hubs have it. A folder that was itself saved
    from a hub names its repository in the config.
    """
    found: dict[str, str] = {}
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
        try:
            value = yaml.safe_load(head[1]) if len(head) == 3 and not head[0].strip() else None
        except yaml.YAMLError:
            value = None
        if isinstance(value, dict):
            found = {k: str(value[k]) for k in ("license", "base_model") if value.get(k)}
    if (folder / "config.json").is_file():
        name = str(read_json(folder / "config.json").get("_name_or_path") or "")
        if name.count("/") == 1 and not name.startswith(("/", ".")):
            found.setdefault("base_model", name)
    return found
