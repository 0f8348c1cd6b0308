"""Finds an extension by its file: `load("methods", "x")` is the SPEC of `methods/x.py`.

Adding one is adding its file; there is no list to edit. Files that begin with `_` are helpers.
Listing names imports nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pocketglm.errors import UsageError, nearest

_ROOT = Path(__file__).parent

# registry -> what one entry is called in an error message
KINDS = {
    "methods": "method",
    "targets": "target",
    "runtimes": "runtime",
    "eval": "task",
    "checks": "check",
    "cli": "verb",
}


def names(kind: str) -> list[str]:
    """The entries of a registry, sorted, read from the file names."""
    return sorted(p.stem for p in (_ROOT / kind).glob("*.py") if not p.stem.startswith("_"))


def check(kind: str, name: str) -> None:
    """Import nothing; only know whether there is such an entry.

    Raises:
        UsageError: there is none; the message lists the known ones.
    """
    known = names(kind)
    if name not in known:
        raise UsageError(f"unknown {KINDS[kind]} '{name}'", nearest(name, known))


def load(kind: str, name: str) -> Any:
    """Import one entry and return its `SPEC`.

    Raises:
        UsageError: there is no such entry.
    """
    check(kind, name)
    return importlib.import_module(f"pocketglm.{kind}.{name}").SPEC
