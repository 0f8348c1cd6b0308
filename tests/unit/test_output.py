"""Output folders: whole or not there, through errors, Ctrl-C, `kill -9`, races and full disks."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketglm.artifacts.output import (
    REQUEST,
    check_place,
    is_done,
    output_folder,
    request_of,
)
from pocketglm.errors import (
    DataError,
    FinishedElsewhereError,
    LockedError,
    OutputExistsError,
    UsageError,
)

# A writer in its own process: writes `part`, then waits to be told on, or to be killed.
CHILD = """
import sys
from pathlib import Path
from pocketglm.artifacts.output import output_folder
with output_folder(Path(sys.argv[1]), sys.argv[2], force="--force" in sys.argv) as partial:
    (partial / "part").write_text("half of the work")
    print("writing", flush=True)
    sys.stdin.readline()
    (partial / "pocketglm.json").write_text('{"request": "%s"}' % sys.argv[2])
"""


def finish(partial: Path, request: str, text: str = "work") -> None:
    (partial / "result").write_text(text)
    (partial / "pocketglm.json").write_text(f'{{"request": "{request}"}}')


def make(out: Path, request: str, text: str = "work", force: bool = False) -> None:
    with output_folder(out, request, force) as partial:
        finish(partial, request, text)


def break_off(out: Path, request: str, error: BaseException, force: bool = False) -> None:
    """Half of the work, then an error."""
    with output_folder(out, request, force) as partial:
        (partial / "part").write_text("half")
        raise error


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "out"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.partial")


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until_writing(process: subprocess.Popen[str]) -> None:
    stdout: Any = process.stdout
    assert stdout.readline() == "writing\n", process.communicate()[1]


# --- the normal way -----------------------------------------------------------------------------


def test_nothing_is_at_out_until_the_end(out: Path, partial: Path) -> None:
    with output_folder(out, "r") as folder:
        assert folder == partial
        finish(folder, "r")
        assert not out.exists()
    assert names(out) == {"result", "pocketglm.json"}
    assert names(out.parent) == {"out"}


def test_finished_work_is_recognised(out: Path) -> None:
    assert not is_done(out, "r", force=False)
    make(out, "r")
    assert is_done(out, "r", force=False)
    assert not is_done(out, "r", force=True)
    assert request_of(out) == "r"


@pytest.mark.parametrize("name", ["pocketglm.json", "export.json", "proof.json"])
def test_each_artifact_records_its_request(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"request": "r"}')
    assert is_done(tmp_path, "r", force=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"request": ""}'])
def test_a_folder_without_a_request_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    assert request_of(tmp_path) is None
    with pytest.raises(OutputExistsError):
        is_done(tmp_path, "r", force=False)


def test_an_empty_folder_may_be_filled(out: Path) -> None:
    out.mkdir(parents=True)
    assert not is_done(out, "r", force=False)
    make(out, "r")
    assert is_done(out, "r", force=False)


def test_something_else_is_refused_and_kept(out: Path) -> None:
    make(out, "theirs", "precious")
    for action in (lambda: is_done(out, "r", False), lambda: make(out, "r")):
        with pytest.raises(OutputExistsError, match="was not made by this command") as caught:
            action()
        assert "--force" in caught.value.hint
    assert (out / "result").read_text() == "precious"
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("name", ["pocketglm.json", "export.json", "proof.json"])
def test_force_replaces_an_output(out: Path, name: str) -> None:
    make(out, "theirs")
    (out / "pocketglm.json").rename(out / name)
    assert not is_done(out, "r", force=True)
    make(out, "r", force=True)
    assert is_done(out, "r", force=False)
    assert names(out) == {"result", "pocketglm.json"}
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("kind", ["folder", "tree", "file", "link", "dangling link"])
@pytest.mark.parametrize("force", [False, True])
def test_what_we_did_not_write_is_never_replaced(
    out: Path, tmp_path: Path, kind: str, force: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, "theirs")  # also a link to an output of ours is the user's
    out.parent.mkdir()
    if kind in ("folder", "tree"):
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        if kind == "tree":  # outputs further down do not make it ours
            make(out / "sub", "theirs")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    for action in (lambda: is_done(out, "r", force), lambda: make(out, "r", force=force)):
        with pytest.raises(OutputExistsError, match="is not an output folder of PocketGLM") as e:
            action()
        assert e.value.exit_code == 2
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("source", ["out", "out/deep/model", "out.partial", "out.replaced"])
def test_out_may_not_be_or_hold_an_input(
    out: Path, source: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(out, "theirs")
    folder = out.parent / source
    if folder != out:
        make(folder, "theirs", "precious")
    monkeypatch.chdir(out.parent)  # one path relative, the other absolute
    text = (folder / "result").read_text()
    for action in (is_done, lambda *a: output_folder(*a).__enter__()):
        with pytest.raises(UsageError, match="would overwrite") as caught:
            action(Path("out"), "r", force, [out / "other", folder])
        assert caught.value.exit_code == 2
    assert (folder / "result").read_text() == text


def test_an_input_reached_by_a_link(out: Path, tmp_path: Path) -> None:
    make(out, "theirs")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UsageError, match="would overwrite"):
        is_done(out, "r", True, [tmp_path / "link"])


@pytest.mark.parametrize("depth", ["", "deep/er"])
def test_out_may_not_lie_in_an_input(
    out: Path, depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.parent.mkdir()
    (tmp_path / "link").symlink_to(out.parent)
    monkeypatch.chdir(tmp_path)
    inside = Path("link", depth, "out")
    for action in (is_done, lambda *a: output_folder(*a).__enter__()):
        with pytest.raises(UsageError, match=f"--out {inside} lies in runs, which") as caught:
            action(inside, "r", True, [Path("runs")])
        assert str(tmp_path / "runs-out") in caught.value.hint
    assert names(out.parent) == set()


def test_inputs_elsewhere_do_not_matter(out: Path) -> None:
    beside = [out.parent / "out2", out.parent / "ou"]
    for folder in beside:
        make(folder, "theirs")
    with output_folder(out, "r", False, beside) as partial:
        finish(partial, "r")
    assert is_done(out, "r", False, beside)


@pytest.mark.parametrize("name", [".", "..", "x/.."])
def test_out_must_have_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for action in (lambda: make(Path(name), "r"), lambda: is_done(Path(name), "r", False)):
        with pytest.raises(UsageError, match="cannot be an output"):
            action()


def test_a_place_where_nothing_can_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    places = [(tmp_path / "file" / "out", "file is a file, not a folder")]
    places += [(tmp_path / "file" / "deep" / "out", "file is a file, not a folder")]
    if os.path.exists("/proc/self"):
        places += [(Path("/proc/x"), "nothing can be created in /proc")]
    for out, words in places:
        for action in (lambda p=out: is_done(p, "r", False), lambda p=out: make(p, "r")):
            with pytest.raises(UsageError, match=re.escape(words)) as caught:
                action()
            assert caught.value.hint
    assert names(tmp_path) == {"file"}


def test_looking_at_a_place_leaves_nothing(out: Path) -> None:
    before = names(out.parent.parent)
    check_place(out)
    assert names(out.parent.parent) == before


# --- errors and interruptions -------------------------------------------------------------------


def test_an_error_before_anything_is_written_leaves_nothing(out: Path) -> None:
    with pytest.raises(DataError), output_folder(out, "r"):
        raise DataError("row 3 is empty")
    assert not out.parent.exists()


def test_an_error_removes_only_the_folders_that_it_made(out: Path) -> None:
    deep = out / "a" / "b"
    make(out / "sibling", "theirs")

    def fail(*, beside: bool) -> None:
        with output_folder(deep / "c", "r"):
            if beside:
                (deep / "another output").mkdir()
            raise DataError("row 3 is empty")

    for beside, left in ((False, {"sibling"}), (True, {"sibling", "a"})):
        with pytest.raises(DataError):
            fail(beside=beside)
        assert names(out) == left
    (deep / "another output").rmdir()
    with pytest.raises(DataError):
        fail(beside=False)
    assert names(deep) == set()  # it was there


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("late"), RuntimeError("bug")])
def test_an_error_in_the_middle_keeps_the_work_for_a_resume(
    out: Path, partial: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        break_off(out, "r", error)
    assert not out.exists()
    with output_folder(out, "r") as folder:
        assert (folder / "part").read_text() == "half"
        finish(folder, "r")
    assert names(out) == {"part", "result", "pocketglm.json"}
    assert not partial.exists()


def test_force_resumes_its_own_work(out: Path) -> None:
    make(out, "theirs")
    with pytest.raises(KeyboardInterrupt):
        break_off(out, "r", KeyboardInterrupt(), force=True)
    assert request_of(out) == "theirs"  # still whole
    with output_folder(out, "r", force=True) as folder:
        assert (folder / "part").exists()
        finish(folder, "r")
    assert request_of(out) == "r"


def test_unfinished_work_of_another_command(out: Path, partial: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        break_off(out, "theirs", KeyboardInterrupt())
    (partial / "sub").mkdir()
    (partial / "sub" / "part").write_text("half")
    (partial / "link").symlink_to(out.parent.parent)
    with pytest.raises(OutputExistsError, match="unfinished work of another command") as caught:
        make(out, "r")
    assert "--force" in caught.value.hint
    assert (partial / "sub" / "part").exists()
    assert (partial / REQUEST).read_text() == "theirs"
    make(out, "r", force=True)
    assert names(out) == {"result", "pocketglm.json"}
    assert out.parent.parent.exists()  # what the link pointed to


@pytest.mark.parametrize("force", [False, True])
def test_unmarked_files_are_somebody_elses(out: Path, partial: Path, force: bool) -> None:
    partial.mkdir(parents=True)
    (partial / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputExistsError, match="is not unfinished work of PocketGLM"):
        make(out, "r", force=force)
    assert names(partial) == {"holiday.jpg"}


def test_kill_nine_in_the_middle_then_resume(
    out: Path, partial: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    process = child(out, "r")
    wait_until_writing(process)
    with pytest.raises(LockedError):
        make(out, "r")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert names(partial) == {REQUEST, "part"}
    with output_folder(out, "r") as folder:  # the kernel freed the lock
        assert (folder / "part").read_text() == "half of the work"
        finish(folder, "r")
    assert is_done(out, "r", force=False)


def test_ctrl_c_in_a_process_keeps_the_work(
    out: Path, partial: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    process = child(out, "r")
    wait_until_writing(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert "KeyboardInterrupt" in stderr
    assert names(partial) == {REQUEST, "part"}
    assert not out.exists()


def test_two_writers(out: Path, child: Callable[..., subprocess.Popen[str]]) -> None:
    first = child(out, "r")
    wait_until_writing(first)
    for force in (False, True):
        with pytest.raises(LockedError, match="another process is writing") as caught:
            make(out, "r", force=force)
        assert caught.value.exit_code == 4
    first.communicate("go on\n")
    assert first.returncode == 0
    assert names(out) == {"part", "pocketglm.json"}


def test_the_slower_of_two_writers_does_not_replace_the_result(out: Path) -> None:
    """Both looked when nothing was there; the other one, with other inputs, has finished since."""
    assert not is_done(out, "r", force=False)
    make(out, "theirs", "precious")
    with pytest.raises(OutputExistsError):
        make(out, "r")
    assert (out / "result").read_text() == "precious"


def test_the_slower_of_two_equal_writers_is_told_that_it_is_done(out: Path) -> None:
    assert not is_done(out, "r", force=False)
    make(out, "r", "the first one's")
    with pytest.raises(FinishedElsewhereError, match="has just finished"):
        make(out, "r", "the second one's")
    assert is_done(out, "r", force=False)
    assert (out / "result").read_text() == "the first one's"
    assert names(out.parent) == {"out"}
    make(out, "r", "again", force=True)
    assert (out / "result").read_text() == "again"


@pytest.mark.parametrize("call", ["open", "flock", "stat"])
def test_a_writer_that_finishes_while_we_take_the_lock(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The other's rename falls exactly before each of our system calls."""
    module = fcntl if call == "flock" else os
    original = getattr(module, call)
    waiting = True

    def late(*args: Any, **kwargs: Any) -> Any:
        nonlocal waiting
        if waiting and (call == "flock" or args[0] == partial):
            waiting = False
            partial.rename(out)
            shutil.rmtree(out)
        return original(*args, **kwargs)

    out.parent.mkdir()
    handles = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else set()
    with monkeypatch.context() as patch:
        patch.setattr(module, call, late)
        with output_folder(out, "r") as folder:
            assert not waiting
            with pytest.raises(LockedError):  # the lock that we have is that of the new folder
                make(out, "r")
            finish(folder, "r")
    assert is_done(out, "r", force=False)
    if handles:
        assert set(os.listdir("/proc/self/fd")) == handles


def test_many_writers_at_once_one_wins(out: Path) -> None:
    """Threads have separate locks too, as each opens the folder itself."""
    results: list[str] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        try:
            with output_folder(out, "r") as folder:
                results.append("wrote")
                time.sleep(0.05)
                finish(folder, "r", str(number))
        except LockedError:
            results.append("locked")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("wrote") >= 1
    assert len(results) == 8
    assert is_done(out, "r", force=False)
    assert names(out.parent) == {"out"}


# --- the commit ---------------------------------------------------------------------------------


def test_something_whole_exists_at_every_step_of_a_replacement(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each change of the folder, an old or a new result is complete on disk."""
    make(out, "old", "old")
    old = out.with_name("out.replaced")
    seen: list[tuple[bool, ...]] = []

    def whole(folder: Path) -> bool:
        return folder.is_dir() and names(folder) >= {"result", "pocketglm.json"}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((whole(out), whole(old), whole(partial)))
            result = original(*args, **kwargs)
            seen.append((whole(out), whole(old), whole(partial)))
            return result

        return call

    with output_folder(out, "new", force=True) as folder:
        finish(folder, "new", "new")
        for module, name in ((os, "rename"), (shutil, "rmtree"), (os, "unlink")):
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    monkeypatch.undo()
    assert len(seen) >= 6
    assert all(any(state) for state in seen)
    assert (False, True, True) in seen  # between the two renames both results are there
    assert (out / "result").read_text() == "new"
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("step", range(5))
def test_a_crash_at_any_step_of_the_commit_can_be_resumed(out: Path, step: int) -> None:
    """`os._exit` at each system call of the commit, in a forked process."""
    make(out, "old", "old")
    process = os.fork()
    if process == 0:
        calls = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if calls == step:
                    os._exit(9)
                calls += 1
                return original(*args, **kwargs)

            return call

        try:
            with output_folder(out, "new", force=True) as folder:
                finish(folder, "new", "new")
                os.rename = counted(os.rename)
                shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]
                Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
        finally:
            os._exit(1)  # the commit had fewer steps
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9

    if request_of(out) != "new":
        with output_folder(out, "new", force=True) as folder:
            assert (folder / "result").read_text() == "new"  # nothing was lost
    assert (out / "result").read_text() == "new"
    assert is_done(out, "new", force=False)


@pytest.mark.parametrize("force", [False, True])
def test_what_a_crash_between_the_renames_left_is_removed(out: Path, force: bool) -> None:
    """A crash after the new one is in place: the old one is still there under another name."""
    old = out.with_name("out.replaced")
    make(out, "r")
    make(old, "old")
    if force:
        make(out, "r", force=True)
    else:
        assert is_done(out, "r", force=False)
    assert names(out.parent) == {"out"}
    make(old, "old")
    shutil.rmtree(out)  # a crash before it is: the next run puts it there
    make(out, "r")
    assert names(out.parent) == {"out"}


def test_a_folder_of_the_users_with_the_name_of_a_replaced_one(out: Path) -> None:
    make(out, "old")
    mine = out.with_name("out.replaced")
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    make(out.with_name("out.replaced-2"), "left by a crash")
    make(out, "new", force=True)
    assert request_of(out) == "new"
    assert names(mine) == {"thesis.txt"}
    assert names(out.parent) == {"out", "out.replaced"}


def test_a_replaced_folder_stays_ours_until_it_is_gone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while it is being removed: the manifest is removed last."""
    make(out, "r")
    old = out.with_name("out.replaced")
    make(old, "old")
    (old / "z").write_text("sorted after the manifest")
    unlink = Path.unlink

    def crash(path: Path, missing_ok: bool = False) -> None:
        if path.name == "pocketglm.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            is_done(out, "r", force=False)
    assert names(old) == {"pocketglm.json"}
    assert is_done(out, "r", force=False)
    assert names(out.parent) == {"out"}


def test_every_file_is_on_the_disk_before_the_rename(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    wanted: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def watched(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(source: Path, target: Path) -> None:
        wanted.update(p.stat().st_ino for p in (source, *source.rglob("*")))
        assert wanted <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "rename", checked)
    with output_folder(out, "r") as partial:
        (partial / "onnx" / "deep").mkdir(parents=True)
        (partial / "onnx" / "deep" / "model.onnx").write_bytes(b"weights")
        finish(partial, "r")
    assert len(wanted) == 7
    assert out.parent.stat().st_ino in synced
