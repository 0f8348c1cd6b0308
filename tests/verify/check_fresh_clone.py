"""Clones the repository into a temporary folder and runs `make test` and `make demo` there."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "pocketglm"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        for target in ("demo", "test"):
            print(f"-- make {target}", flush=True)
            done = subprocess.run(["make", target], cwd=clone, check=False)
            if done.returncode:
                sys.exit(f"make {target} ended with {done.returncode} in a fresh clone")
    print("make demo and make test: ok in a fresh clone")


if __name__ == "__main__":
    main()
