"""Conversion to INT4 ONNX measured: writes benchmarks/convert.md.

    python benchmarks/convert.py [--work runs/convert] [--rounds 3] [--sizes 98M 1.1B 4B]

For a random Llama in bf16 of each size, `pocketglm compress` and `pocketglm export` run in fresh
processes; for 1.1 B so does onnxruntime-genai's own builder, in turns. Resumable: a measured
round is kept in WORK/results.json. Run it on an otherwise idle machine; 4 B takes
15 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# hidden, layers, heads, kv heads, head_dim, ffn; vocabulary 32000, tied head
SHAPES = {
    "98M": (640, 15, 10, 2, 64, 2176),
    "210M": (896, 20, 14, 2, 64, 2688),
    "1.1B": (1792, 30, 14, 2, 128, 5120),
    "4B": (3072, 36, 24, 4, 128, 9216),
}
COMPARED = "1.1B"
BUILDER = ("onnxruntime_genai", "onnx_ir")  # what its builder imports
# One tensor for embedding and head, as the builder makes it; activations in int8 by block.
PLAN = [
    "--method", "quantize_rtn", "--set", "bits=4", "--set", "embeddings=4",
    "--set", "group_size=32", "--set", "activation=dynamic_block",
]  # fmt: skip
Measured = dict[str, float]


def make(size: str, out: Path) -> None:
    """A random checkpoint of `size`, written as it is drawn. In a process of its own: the one that
    measures must stay small, because a child's peak begins with its parent's memory.
    """
    import torch

    from pocketglm.artifacts.manifest import Manifest
    from pocketglm.data.tokenizer_training import byte_tokenizer, save_chat_tokenizer
    from pocketglm.model.decoder import initial_values
    from pocketglm.model.hf import write_decoder
    from pocketglm.model.sizes import shapes
    from pocketglm.model.spec import DecoderSpec, RopeSpec
    from pocketglm.ops.stored import as_array

    hidden, layers, heads, kv, head, ffn = SHAPES[size]
    spec = DecoderSpec(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        intermediate_size=ffn,
        rope=RopeSpec(head, interleaved=False),
        max_position_embeddings=4096,
        tied=True,
    )
    sizes = shapes(spec)
    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_decoder(
        spec,
        partial,
        lambda name: (
            as_array(torch.from_numpy(rows).to(torch.bfloat16))
            for rows in initial_values(name, sizes[name])
        ),
        source=None,
        manifest=Manifest(),
        dtype=torch.bfloat16,
    )
    save_chat_tokenizer(byte_tokenizer(), partial, spec.max_position_embeddings)
    partial.rename(out)


def measure(*command: str) -> Measured:
    """Wall and CPU seconds and peak resident bytes of a fresh process."""
    print("$", " ".join(command), flush=True)
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"ended with {child.returncode}")
    # Linux counts in KiB.
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}


def ours(ckpt: Path, work: Path) -> dict[str, Measured]:
    """Both verbs on a checkpoint; nothing is in the step cache."""
    for name in ("int4", "export", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)
    os.environ["POCKETGLM_CACHE"] = str(work / "cache")
    program = [sys.executable, "-m", "pocketglm"]
    found = {
        "compress": measure(*program, "compress", str(ckpt), *PLAN, "--out", str(work / "int4")),
        "export": measure(
            *program, "export", str(work / "int4"), "--target", "onnx",
            "--out", str(work / "export"),
        ),
    }  # fmt: skip
    folder = work / "export" / "onnx"
    parity = json.loads((folder / "export.json").read_text())["parity"]
    found["result"] = {
        "bytes": float(sum(file.stat().st_size for file in folder.iterdir())),
        "blocks": float(len(parity["blocks"])),
        "worst": max(parity["blocks"].values()),
    }
    return found


def builder(ckpt: Path, work: Path) -> dict[str, Measured]:
    """onnxruntime-genai's builder on the same checkpoint."""
    out = work / "builder"
    shutil.rmtree(out, ignore_errors=True)
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    return {
        "builder": measure(
            *module, "-m", str(ckpt), "-o", str(out), "-p", "int4", "-e", "cpu",
            "-c", str(work / "builder-cache"),
        )
    }  # fmt: skip


def median(rounds: list[dict[str, Measured]], what: str, key: str) -> float:
    return statistics.median(r[what][key] for r in rounds)


def _cpu(rounds: list[dict[str, Measured]], *what: str) -> float:
    return sum(median(rounds, each, "cpu") for each in what)


def report(results: dict[str, list[dict[str, Measured]]]) -> str:
    lines = [
        "# Conversion to INT4 ONNX",
        "",
        "Random Llama checkpoints in bf16 (tied head, vocabulary 32000) to INT4 ONNX by groups of",
        "32, embedding and head as one tensor. `compress` and `export` run in fresh processes and",
        "include the digests of their inputs and outputs, and the export's parity check by blocks.",
        "Median of the rounds; the largest peak. Made by `python benchmarks/convert.py`.",
        "",
        "| model | rounds | compress s | peak MB | export s | peak MB | both | file MB | parity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, rounds in results.items():
        walls = [median(rounds, verb, "wall") for verb in ("compress", "export")]
        both = statistics.median(r["compress"]["wall"] + r["export"]["wall"] for r in rounds)
        peaks = [max(r[verb]["peak"] for r in rounds) / 1e6 for verb in ("compress", "export")]
        parity = f"{rounds[-1]['result']['blocks']:.0f} parts, {rounds[-1]['result']['worst']:.1e}"
        lines.append(
            f"| {size} | {len(rounds)} | {walls[0]:.1f} | {peaks[0]:.0f} | {walls[1]:.1f} | "
            f"{peaks[1]:.0f} | {both:.1f} | {rounds[-1]['result']['bytes'] / 1e6:.0f} | {parity} |"
        )
    compared = [r for r in results.get(COMPARED, []) if "builder" in r]
    if compared:
        shares = [
            (r["compress"]["wall"] + r["export"]["wall"]) / r["builder"]["wall"] for r in compared
        ]
        peak = max(r["builder"]["peak"] for r in compared)
        lines += [
            "",
            f"onnxruntime-genai's builder (`-p int4 -e cpu`) on the same {COMPARED} checkpoint, in",
            f"turns: {median(compared, 'builder', 'wall'):.1f} s, peak {peak / 1e6:.0f} MB. Ours "
            f"takes {statistics.median(shares):.2f} of",
            f"its wall time (rounds {min(shares):.2f} to {max(shares):.2f}; must be at most 0.50, "
            "goal 0.25).",
            f"CPU seconds: ours {_cpu(compared, 'compress', 'export'):.1f}, "
            f"the builder's {_cpu(compared, 'builder'):.1f}.",
        ]
    tools = ["pocketglm", "torch", "onnx", "onnxruntime"]
    if compared:
        tools.append("onnxruntime-genai")
    lines += [
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, {_processor()}, load average "
        f"{os.getloadavg()[2]:.0f} (other work ran beside it where that is above 2), Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in tools)
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/convert"))
    parser.add_argument("--rounds", type=int, default=3, help=f"of {COMPARED}; the others run once")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["98M", "1.1B", "4B"])
    parser.add_argument("--no-builder", action="store_true")
    parser.add_argument("--make", metavar="SIZE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make:
        make(args.make, args.work / args.make)
        return
    missing = [name for name in BUILDER if importlib.util.find_spec(name) is None]
    if missing and not args.no_builder:
        sys.exit(f"the builder needs {', '.join(missing)}: pip install it, or add --no-builder")
    file = args.work / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for size in args.sizes:
        ckpt, work = args.work / size, args.work / f"{size}-out"
        wanted = args.rounds if size == COMPARED else 1
        while len(rounds := results.setdefault(size, [])) < wanted:
            if not ckpt.exists():
                measure(sys.executable, __file__, "--work", str(args.work), "--make", size)
            found = ours(ckpt, work)
            if not args.no_builder and size == COMPARED:
                found |= builder(ckpt, work)
            rounds.append(found)
            file.write_text(json.dumps(results, indent=1))
        shutil.rmtree(ckpt, ignore_errors=True)  # 8 GB of the largest
        shutil.rmtree(work, ignore_errors=True)
    (HERE / "convert.md").write_text(report({size: results[size] for size in args.sizes}))


if __name__ == "__main__":
    main()
