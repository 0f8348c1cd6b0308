"""The step cache of `compress`: one finished, verified checkpoint folder per step.

An entry is named after the digest of everything that determines it. It is written like any output
(`artifacts/output.py`: partial folder, lock, rename), and holds the digest of its own files, so
that a damaged entry is seen and built again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.output import REQUEST, disk_errors, output_folder
from pocketglm.contracts import WORK
from pocketglm.errors import InputError, LockedError

SEAL = "step.sha256"
_NAME = re.compile(r"[0-9a-f]{64}(\.partial|\.replaced)?")
_WAIT = 0.1  # seconds between looks at an entry that another process is writing


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished step; its last lineage entry says what was measured."""

    ckpt: Checkpoint
    digest: str
    reused: bool


def cache_root() -> Path:
    """$POCKETGLM_CACHE, or ~/.cache/pocketglm/steps."""
    given = os.environ.get("POCKETGLM_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "pocketglm" / "steps"


def sealed_digest(root: Path, key: str) -> str | None:
    """The digest that an entry was sealed with, None if there is no entry. Its files are not read:
    `find` is what tells whether they are whole.
    """
    try:
        return (root / key / SEAL).read_text()
    except (OSError, ValueError):
        return None


def find(root: Path, key: str) -> Entry | None:
    """The entry, if it is there and its files are as they were written."""
    sealed = sealed_digest(root, key)
    if sealed is None:
        return None
    try:
        ckpt = Checkpoint.open(root / key)
        return Entry(ckpt, sealed, reused=True) if ckpt.digest() == sealed else None
    except (OSError, ValueError, InputError):
        return None


def obtain(root: Path, key: str, build: Callable[[Path], None]) -> Entry:
    """The entry, built by `build(folder)` unless it is there.

    Where another process is building the same entry, waits for it.

    Raises:
        DiskFullError, UsageError: the cache cannot be written.
    """
    while (entry := find(root, key)) is None:
        try:
            # owned: what is there is no valid entry, see find(), and may be replaced.
            with output_folder(root / key, key, owned=True) as folder:
                if find(root, key):
                    raise _FinishedElsewhereError
                digest = _fill(folder, build)
        except LockedError:
            time.sleep(_WAIT)
        except _FinishedElsewhereError:
            pass
        else:
            return Entry(Checkpoint.open(root / key), digest, reused=False)
    return entry


class _FinishedElsewhereError(Exception):
    """Another process finished the entry between our look and our lock."""


def _fill(folder: Path, build: Callable[[Path], None]) -> str:
    """Build and seal an entry. On an error nothing of it stays; after Ctrl-C, as after a kill, what
    a step has put into WORK, to go on from.
    """
    try:
        build(folder)
        digest = Checkpoint.open(folder).digest()
        (folder / SEAL).write_text(digest)
    except BaseException as error:
        kept = (REQUEST, WORK) if isinstance(error, KeyboardInterrupt) else (REQUEST,)
        for item in folder.iterdir():
            if item.name not in kept:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        raise
    return digest


def usage(root: Path) -> tuple[int, int]:
    """Number of entries, and bytes of everything in the cache."""
    folders = _folders(root)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    entries = sum(folder.suffix == "" for folder in folders)
    return entries, sum(file.stat().st_size for file in files)


def clear(root: Path) -> None:
    """Delete every entry; other files in the folder are left alone."""
    with disk_errors(root):
        for folder in _folders(root):
            shutil.rmtree(folder)


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.glob("*") if f.is_dir() and _NAME.fullmatch(f.name))
