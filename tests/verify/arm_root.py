"""A small arm64 Debian with the real aarch64 wheels, and a command to run Python in it with QEMU.

Kept in runs/verify/arm; made again when a pinned version changes. Packages are unpacked, not
installed: no program of the root runs before the first use, and no binfmt handler is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "runs" / "verify" / "arm"
SKIPPED = 77
SUITE, MIRROR, PYTHON = "bookworm", "http://deb.debian.org/debian", "3.11"
PACKAGES = f"python{PYTHON},libstdc++6,libgomp1"
# What the runtimes and our torch-free modules import.
WHEELS = (
    "numpy", "onnxruntime", "ai-edge-litert", "tokenizers", "pydantic", "pydantic_core",
    "annotated-types", "typing_extensions", "typing-inspection", "ml_dtypes", "flatbuffers",
    "protobuf", "backports.strenum", "tqdm",
)  # fmt: skip
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
# What QEMU calls a core -> (implementer, part) as /proc/cpuinfo tells them. SME stays off: with it
# ONNX Runtime's int8 products came out wrong in QEMU 7.2, by the kernel's fault or the emulator's.
CPUS = {"max,sme=off": ("0x00", "0x051"), "cortex-a76": ("0x41", "0xd0b")}
# Names of the bits of AT_HWCAP and AT_HWCAP2, in their order (Linux, arch/arm64, cpuinfo.c).
HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16 dgh rng bti mte ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 "
    "smef16f32 smeb16f32 smef32f32 smefa64 wfxt ebf16"
)
CORES = 2


def skip(reason: str) -> None:
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def pins() -> list[str]:
    """The wheels as pinned in constraints.txt."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        pinned[name.lower().replace("-", "_")] = version
    return [f"{name}=={pinned[name.lower().replace('-', '_')]}" for name in WHEELS]


def prepare() -> Path:
    """The root, made where it is missing. Ends the check as skipped where it cannot be made."""
    root, ready = HOME / "root", HOME / "root.ready"
    _tools()
    key = "\n".join([SUITE, PACKAGES, *pins()])
    if not (ready.is_file() and ready.read_text() == key):
        ready.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        HOME.mkdir(parents=True, exist_ok=True)
        _debian(root)
        _wheels(root)
        ready.write_text(key)
    emulator = root / "usr" / "bin" / "qemu-aarch64-static"
    new = emulator.with_suffix(".new")
    shutil.copy2(str(shutil.which(emulator.name)), new)
    new.replace(emulator)  # a killed check may have left one that still runs
    cores = root / "sys" / "devices" / "system" / "cpu"  # this machine's own would make them fail
    cores.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present", "online"):
        (cores / name).write_text(f"0-{CORES - 1}\n")
    return root


def _tools() -> None:
    missing = [p for p in ("qemu-aarch64-static", "debootstrap") if not shutil.which(p)]
    if os.geteuid():
        skip("chroot needs root: run it as root, or in a container")
    if missing and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        install = ["apt-get", "install", "-y", "-qq", "qemu-user-static", "debootstrap"]
        subprocess.run(install, check=False, stdout=subprocess.DEVNULL)
    if not (shutil.which("qemu-aarch64-static") and shutil.which("debootstrap")):
        skip("no QEMU or debootstrap (apt-get install qemu-user-static debootstrap)")


def _debian(root: Path) -> None:
    print(f"making an arm64 root of Debian {SUITE} ...", flush=True)
    log = HOME / "debootstrap.log"
    command = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, f"--include={PACKAGES}", SUITE, str(root), MIRROR],
            stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    archives = root / "var" / "cache" / "apt" / "archives"
    if done.returncode or not any(archives.glob("python*.deb")):
        skip(f"debootstrap could not fetch {SUITE} from {MIRROR}, see {log}")
    for package in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        package.unlink()


def _wheels(root: Path) -> None:
    print("fetching the aarch64 wheels ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    platforms = [part for tag in TAGS for part in ("--platform", f"{tag}_aarch64")]
    wanted = ["--only-binary=:all:", "--python-version", PYTHON, *pins()]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, *platforms, "--dest", folder, *wanted], check=False)
        if done.returncode:
            skip(f"pip could not fetch the aarch64 wheels: {', '.join(pins())}")
        for wheel in Path(folder).glob("*.whl"):
            shutil.unpack_archive(wheel, root / "site", "zip")


def command(root: Path, cpu: str, *arguments: str) -> list[str]:
    """What runs the root's Python on an emulated core, with /proc in a namespace of its own.

    ONNX Runtime asks /proc/self/fd where a file of weights really lies; /proc/cpuinfo must be that
    of the core (`describe`), because libraries that choose kernels read it.
    """
    mounts = (
        'mount --bind /proc "$0/proc" && mount --bind "$0/$1" "$0/proc/cpuinfo" && shift && '
        'exec chroot "$0" "$@"'
    )
    emulator = ["/usr/bin/qemu-aarch64-static", "-cpu", cpu]
    paths = ["-E", "PYTHONPATH=/site:/work/src", "-E", "LC_ALL=C.UTF-8", "-E", "HOME=/tmp"]
    inside = [*emulator, *paths, f"/usr/bin/python{PYTHON}", *arguments]
    return ["unshare", "--mount", "sh", "-c", mounts, str(root), f"cpuinfo-{cpu}", *inside]


def describe(root: Path, cpu: str) -> list[str]:
    """Write the /proc/cpuinfo of a core; its features, as the emulator has them."""
    file = root / f"cpuinfo-{cpu}"
    file.touch()
    code = (
        "import ctypes; f = ctypes.CDLL(None).getauxval; f.restype = ctypes.c_ulong; "
        "f.argtypes = [ctypes.c_ulong]; print(f(16), f(26))"
    )
    done = subprocess.run(command(root, cpu, "-c", code), capture_output=True, text=True)
    if done.returncode:
        skip(f"the emulator does not run here: {done.stderr.strip()[-300:]}")
    bits = [int(word) for word in done.stdout.split()]
    features = [
        name
        for names, word in zip((HWCAP, HWCAP2), bits, strict=True)
        for index, name in enumerate(names.split())
        if word >> index & 1
    ]
    implementer, part = CPUS[cpu]
    core = (
        "processor\t: {}\nBogoMIPS\t: 100.00\n"
        f"Features\t: {' '.join(features)}\nCPU implementer\t: {implementer}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0\n\n"
    )
    file.write_text("".join(core.format(i) for i in range(CORES)))
    return features
