"""`make verify`: the checks that CI cannot hold; writes docs/verified.md.

Each check is a command. It ends 0 = passed, 77 = skipped (its last line says why), else failed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77
CHECKS = {
    "Transformers.js opens the encoder exports": [
        sys.executable, "tests/verify/check_transformers_js.py",
    ],
    "llama.cpp opens the GGUF exports": [
        sys.executable, "tests/verify/check_gguf.py",
    ],
    "aarch64 computes what x86 does (emulated)": [
        sys.executable, "tests/verify/check_arm.py",
    ],
    "report.html in headless Chromium, wide and phone-sized": [
        sys.executable, "tests/verify/check_report.py",
    ],
}  # fmt: skip
PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "compressed-tensors",
    "accelerate",
    "gguf",
    "ai-edge-litert",
)


def run(command: list[str]) -> tuple[str, str, float]:
    """verdict, last line of the output, seconds."""
    start, last = time.monotonic(), ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    verdict = {0: "passed", SKIPPED: "skipped"}.get(process.returncode, "FAILED")
    return verdict, last, time.monotonic() - start


def main() -> None:
    rows, failed = [], False
    for name, command in CHECKS.items():
        print(f"== {name}", flush=True)
        verdict, line, seconds = run(command)
        failed |= verdict == "FAILED"
        rows.append(f"| {name} | {verdict} | {seconds:.0f} s | {line.replace('|', '/')} |")
        print(f"== {verdict}", flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    (ROOT / "docs" / "verified.md").write_text(
        "\n".join(
            [
                "# Verified\n",
                "<!-- Written by `make verify`. -->\n",
                f"{datetime.date.today()}, {platform.machine()}, Python "
                f"{platform.python_version()}; {versions}.\n",
                "| check | verdict | time | last line |",
                "| --- | --- | --- | --- |",
                *rows,
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
