"""Output folders that are either whole or not there.

Work happens in `OUT.partial/`, locked by this process and marked with the request that it belongs
to; a finished folder is renamed to `OUT`. The same request resumes what it finds. The lock is
flock on the folder itself: the kernel frees it when a process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketglm.errors import (
    DiskFullError,
    FinishedElsewhereError,
    LockedError,
    OutputExistsError,
    UsageError,
)

REQUEST = ".request"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MANIFESTS = ("pocketglm.json", "export.json", "proof.json")


def request_of(folder: Path) -> str | None:
    """The request digest that a finished folder records, or None."""
    for name in _MANIFESTS:
        try:
            value = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(value, dict) and value.get("request"):
            return str(value["request"])
    return None


def is_done(out: Path, request: str, force: bool, inputs: Sequence[Path] = ()) -> bool:
    """Whether `out` already holds the result of this request.

    `inputs` are the files and folders that the work reads: `out` may not be, hold or lie in one of
    them.

    Raises:
        UsageError: `out` is, holds or lies in one of `inputs`, or cannot be created.
        OutputExistsError: it holds something else and `force` is not set; or it is a file, a link
            or a folder that PocketGLM did not write, which `force` does not replace either.
    """
    keep_inputs(out, inputs)
    if not os.path.lexists(out):
        check_place(out)
        return False
    if out.is_dir() and request_of(out) == request and not force:
        _free_name(out)
        return True
    if not out.is_symlink() and out.is_dir() and not any(out.iterdir()):
        return False
    if not _is_ours(out):
        raise OutputExistsError(
            f"{out} exists and is not an output folder of PocketGLM",
            "choose another --out (--force replaces outputs of PocketGLM only)",
        )
    if not force:
        raise OutputExistsError(
            f"{out} exists and was not made by this command with these inputs",
            "choose another --out, or add --force to replace it",
        )
    return False


def keep_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write over an input, also at the names beside `out` that are used meanwhile, or
    among the files of one.

    Raises:
        UsageError: `out` is, holds or lies in one of `inputs`, or is no name.
    """
    if out.name in ("", ".."):
        raise UsageError(f"--out '{out}' cannot be an output", "give --out a new name")
    places = [out.with_name(out.name + end).resolve() for end in ("", ".partial", ".replaced")]
    for path in inputs:
        source = path.resolve()
        if any(place in (source, *source.parents) for place in places):
            raise UsageError(
                f"--out {out} would overwrite {path}, which this command reads",
                "choose another --out",
            )
        if source.is_dir() and source in places[0].parents:
            raise UsageError(
                f"--out {out} lies in {path}, which this command reads",
                f"choose an --out beside it, such as {source.with_name(f'{source.name}-out')}",
            )


def check_place(out: Path) -> None:
    """Try whether something can be created where `out` will lie; nothing stays.

    Raises:
        UsageError: it cannot.
        DiskFullError: no space left.
    """
    place = next((folder for folder in out.parents if os.path.lexists(folder)), Path())
    if not place.is_dir():
        raise UsageError(f"--out {out}: {place} is a file, not a folder", "choose another --out")
    with disk_errors(out):
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".pocketglm-", dir=place))
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise UsageError(
                f"--out {out}: nothing can be created in {place.resolve()} ({error.strerror})",
                "check its owner and mode, or choose another --out",
            ) from error


def _is_ours(folder: Path) -> bool:
    """Whether PocketGLM wrote this folder: it has one of the manifests."""
    return not folder.is_symlink() and any((folder / name).is_file() for name in _MANIFESTS)


@contextmanager
def output_folder(
    out: Path,
    request: str,
    force: bool = False,
    inputs: Sequence[Path] = (),
    *,
    owned: bool = False,
) -> Iterator[Path]:
    """Yields the partial folder of `out`; on success it becomes `out`, replacing what is there.

    The body writes its files there, finding what an interrupted run of the same request left.
    The body's manifest must record `request`. On an error the partial folder stays for a resume
    if the body left something besides the marker, else it is removed, and so are the folders above
    it that this call has made.

    `inputs` as in `is_done`. `owned`: `out` lies in a folder of PocketGLM's own (the step cache),
    where anything of this name may be replaced.

    Raises:
        LockedError: another process is writing the same output.
        FinishedElsewhereError: it has finished since `is_done` was asked; ask again.
        UsageError, OutputExistsError: as `is_done`; also if unfinished work of another request is
            there and `force` is not set, or files that PocketGLM did not write.
        DiskFullError: no space left.
    """
    keep_inputs(out, inputs)
    partial = out.with_name(out.name + ".partial")
    check_place(out)
    missing = [folder for folder in out.parents if not folder.exists()]
    with disk_errors(out):
        handle = _lock(partial)
        try:
            if not owned and is_done(out, request, force, inputs):
                raise FinishedElsewhereError(
                    f"another process has just finished {out}", "run the same command to see it"
                )
            _claim(partial, request, force or owned)
            yield partial
        except BaseException:
            _drop_if_empty(partial, missing)
            raise
        else:
            _commit(partial, out)
        finally:
            os.close(handle)


def drop_unfinished(out: Path) -> None:
    """Remove what a process that died left of `out`, unless another one writes it by now.

    Only for work that cannot resume.
    """
    partial = out.with_name(out.name + ".partial")
    if not (partial / REQUEST).is_file():
        return
    with suppress(LockedError):
        handle = _lock(partial)
        try:
            shutil.rmtree(partial)
        finally:
            os.close(handle)


def _lock(partial: Path) -> int:
    """An fd that holds the lock of the folder that `partial` names now."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        # Another writer may finish, and rename the folder, between any two of these lines.
        with suppress(FileNotFoundError):
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(partial)):
                    return handle
            except BlockingIOError as error:
                os.close(handle)
                raise LockedError(
                    f"another process is writing {partial}", "wait for it, or choose another --out"
                ) from error
            except FileNotFoundError:
                pass
            os.close(handle)


def _claim(partial: Path, request: str, force: bool) -> None:
    marker = partial / REQUEST
    try:
        owner = marker.read_text()
    except FileNotFoundError:
        owner = None
    strange = owner != request and any(f.name != REQUEST for f in partial.iterdir())
    if strange and owner is None:
        raise OutputExistsError(
            f"{partial} exists and is not unfinished work of PocketGLM",
            "move that folder away, or choose another --out",
        )
    if strange and not force:
        raise OutputExistsError(
            f"{partial} holds unfinished work of another command",
            "run that command again to finish it, or add --force to discard it",
        )
    if owner != request:
        _empty(partial)
        marker.write_text(request)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != REQUEST:  # without its marker it would be a stranger's after a crash
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop_if_empty(partial: Path, above: Sequence[Path]) -> None:
    if any(entry.name != REQUEST for entry in partial.iterdir()):
        return
    shutil.rmtree(partial)
    with suppress(OSError):  # another output lies there by now
        for folder in above:
            folder.rmdir()


def _commit(partial: Path, out: Path) -> None:
    _sync_tree(partial)
    if os.path.lexists(out):
        # Nothing is lost on a crash here: the old folder is still there under another name.
        old = _free_name(out)
        os.rename(out, old)
        os.rename(partial, out)
        _remove_replaced(old)
    else:
        os.rename(partial, out)
    (out / REQUEST).unlink()  # only now: a crash before the rename leaves work that can resume
    _sync(out.parent)
    _free_name(out)  # an earlier run may have crashed between the renames


def _free_name(out: Path) -> Path:
    """A name for what `out` replaces. Removes replaced outputs that a crash left behind.

    A folder of such a name that PocketGLM did not write stays: the next name is taken.
    """
    number = 0
    while True:
        number += 1
        old = out.with_name(f"{out.name}.replaced" + (f"-{number}" if number > 1 else ""))
        if _is_ours(old):
            _remove_replaced(old)
        if not os.path.lexists(old):
            return old


def _remove_replaced(folder: Path) -> None:
    """Remove a replaced output, its manifests last: after a crash it is still known as ours."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name in _MANIFESTS):
        with suppress(FileNotFoundError):  # another process may be removing it too
            _remove(entry)
    with suppress(FileNotFoundError):
        folder.rmdir()


def _sync_tree(folder: Path) -> None:
    """Bring every file and folder to the disk: a rename alone may get there before them."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(path, name)
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _sync(Path(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns 'no space left' and 'permission denied' into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"no space left on the disk of {out}",
                "free some space and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(
                f"{error.filename or out}: {error.strerror}",
                "check its owner and mode, or choose another --out",
            ) from error
        raise


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
