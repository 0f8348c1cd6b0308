"""Output folders on disks that are full, and at places that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pocketglm.artifacts.output import disk_errors, free_bytes, is_done, output_folder
from pocketglm.errors import DiskFullError, UsageError


def write_big(out: Path, file: Path | None = None) -> None:
    """Writes 40 kB (through a link to `file`, if one is given)."""
    with output_folder(out, "r") as partial:
        (partial / "part").write_text("half")
        if file:
            (partial / "big").symlink_to(file)
        (partial / "big").write_bytes(b"y" * 40_000)
        (partial / "pocketglm.json").write_text('{"request": "r"}')


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "out"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.partial")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_disk_full(out: Path, partial: Path) -> None:
    """/dev/full answers a write with the kernel's own ENOSPC."""
    with pytest.raises(DiskFullError, match="no space left") as caught:
        write_big(out, Path("/dev/full"))
    assert caught.value.exit_code == 4
    assert "resumes" in caught.value.hint
    assert not out.exists()
    assert "part" in names(partial)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("not allowed to mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk_then_resume(tiny_disk: Path) -> None:
    out = tiny_disk / "out"
    (tiny_disk / "ballast").write_bytes(b"x" * 40_000)
    assert free_bytes(out) < 30_000
    with pytest.raises(DiskFullError):
        write_big(out)
    assert not out.exists()
    (tiny_disk / "ballast").unlink()
    assert (tiny_disk / "out.partial" / "part").read_text() == "half"
    write_big(out)
    assert is_done(out, "r", force=False)


def test_a_disk_that_is_full_from_the_start_is_left_clean(tiny_disk: Path) -> None:
    with (tiny_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(b"x" * 4096)
    with pytest.raises(DiskFullError):
        write_big(tiny_disk / "out")
    assert names(tiny_disk) == {"ballast"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_permission_errors_say_which_path(out: Path, code: int) -> None:
    blocked = "/some/where/config.json"
    with pytest.raises(UsageError) as caught, disk_errors(out):
        raise OSError(code, os.strerror(code), blocked)
    assert caught.value.message == f"{blocked}: {os.strerror(code)}"
    assert "--out" in caught.value.hint


def test_permission_error_without_a_path_names_out(out: Path) -> None:
    with pytest.raises(UsageError, match=f"{out}: Permission"), disk_errors(out):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """As another user where we are root, who may write everywhere."""
    tmp_path.chmod(0o777)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pocketglm.artifacts.output import output_folder\n"
        "from pocketglm.errors import UsageError\n"
        "os.geteuid() or os.setuid(65534)\n"
        "try:\n"
        "    with output_folder(Path(sys.argv[1]), 'r'): pass\n"
        "except UsageError as error: print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "out"], cwd=locked, capture_output=True, text=True
    )
    assert done.stdout.startswith("--out out: nothing can be created in "), done.stderr
    assert done.stdout.endswith("locked (Permission denied)\n")


def test_a_disk_without_room_for_a_folder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out.parent.mkdir()
    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(DiskFullError):
        is_done(out, "r", force=False)


def test_out_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file is a file, not a folder"):
        write_big(tmp_path / "file" / "out")


def test_partial_that_is_a_file(out: Path, partial: Path) -> None:
    out.parent.mkdir()
    partial.write_text("a file")
    with pytest.raises(UsageError, match=r"out\.partial: File exists"):
        write_big(out)
    assert partial.read_text() == "a file"


def test_other_os_errors_stay_what_they_are(out: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(out):
        (out / "none").read_bytes()


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.05
    )
