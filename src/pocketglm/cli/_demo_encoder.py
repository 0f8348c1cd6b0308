"""The demo's encoders: label a sentence with an intent, in INT8, next to the fp32 model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketglm.artifacts.manifest import Manifest, Step, tool_versions
from pocketglm.artifacts.output import is_done, output_folder
from pocketglm.artifacts.schemas import ProveResult
from pocketglm.cli._common import table
from pocketglm.cli.run import answer
from pocketglm.contracts import DataOptions, Reporter, RunOptions
from pocketglm.data.commands import generate
from pocketglm.data.tokenizer_training import save_tokenizer, train_wordpiece
from pocketglm.model.encoder import init_encoder
from pocketglm.model.hf import save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.runtimes import open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan
from pocketglm.stages.prove import Gates, prove
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import FinetuneConfig, finetune

# Never in the training rows; the last English one shares no content word with its intent.
SENTENCES = {
    "en": (
        "could you get me up at a quarter to seven tomorrow",
        "I can barely see the screen in this sun",
        "let my sister know that I am running late",
    ),
    "zh": ("明天早上七点一刻叫我起床", "把客厅的灯关掉"),
}
NAMES = {"en": "MiniLM, English", "zh": "small encoder, Chinese"}
MEASURES = {
    "accuracy_drop": "accuracy, %",
    "oos_recall_drop": "out-of-scope recall, %",
    "size_ratio": "model file, MB",
    "speedup": "latency, ms",
    "memory_ratio": "peak memory, MB",
}
# A pretrained model; and one from scratch, which needs more passes and more restraint.
TRAINING: dict[str, dict[str, Any]] = {
    "en": {"epochs": 4, "learning_rate": 2e-4},
    "zh": {
        "epochs": 14, "learning_rate": 1e-3, "head_multiplier": 1.0, "patience": 14,
        "label_smoothing": 0.1, "weight_decay": 0.1,
    },
}  # fmt: skip
GATES = {
    "en": Gates(max_accuracy_drop=1.5, min_speedup=1.5, min_size_ratio=3.8),
    "zh": Gates(max_accuracy_drop=2.0, min_size_ratio=3.3),  # too small to gain much speed
}


def small_encoder(folder: Path, seed: int, force: bool) -> None:
    """An untrained encoder of 0.8 M parameters with its own tokenizer for Chinese commands."""
    request = f"demo base {seed}"
    if is_done(folder, request, force):
        return
    texts = [row.text for row in generate("train", "zh", seed)]
    tokenizer = train_wordpiece(texts, vocab_size=2000)
    spec = EncoderSpec(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=160,
        num_layers=2,
        num_heads=5,
        intermediate_size=640,
        max_position_embeddings=64,
        dropout=0.3,  # 4,000 rows of few phrasings: it overfits within five epochs otherwise
    )
    step = Step(method="init", seed=seed, versions=tool_versions("torch"))
    manifest = Manifest(request=request, max_length=64, lineage=[step])
    with output_folder(folder, request, force) as work:
        save_encoder(init_encoder(spec, seed), work, source=None, labels=[], manifest=manifest)
        save_tokenizer(tokenizer, work, 64)


def path_to_phone(
    base: Path,
    language: str,
    out: Path,
    minutes: float,
    threads: int | None,
    seed: int,
    force: bool,
    reporter: Reporter,
) -> ProveResult:
    """The five verbs that a user would type: train, compress, export, and prove against fp32."""
    data = Path(f"commands-{language}")
    config = FinetuneConfig(data=data, minutes=minutes, seed=seed, **TRAINING[language])
    finetune(base, config, out / "checkpoint", force=force, reporter=reporter)
    plan = Plan.single("quantize_rtn", {"bits": 8, "embeddings": 8, "head": 8})
    compress(out / "checkpoint", plan, out / "quantized", force=force, reporter=reporter)
    export(out / "quantized", ["onnx"], out / "int8", force=force, reporter=reporter)
    return prove(
        out / "int8" / "onnx",
        out / "checkpoint",
        "intent",
        DataOptions(data),
        out / "proof",
        gates=GATES[language],
        threads=threads,
        force=force,
        reporter=reporter,
    )


def before_after(language: str, proof: ProveResult) -> list[dict[str, Any]]:
    """Rows of the demo's table: what a phone notices, before and after."""
    return [
        {
            "model": NAMES[language],
            "measure": words,
            "fp32": claim.baseline,
            "int8": claim.candidate,
            "change": claim.value,
            "unit": claim.unit,
            "verdict": claim.verdict,
        }
        for metric, words in MEASURES.items()
        for claim in proof.claims
        if claim.metric == metric
    ]


def answers(folder: Path, language: str) -> list[dict[str, Any]]:
    session = open_encoder(folder, RunOptions())
    tokenizer = Tokenizer.load(folder)
    try:
        results = [answer(session, tokenizer, folder, t, 1, None) for t in SENTENCES[language]]
    finally:
        session.close()
    return [
        {"text": r.text, "label": r.label, "score": r.score, "milliseconds": r.milliseconds}
        for r in results
    ]


def show(rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """The table and the answers."""
    cells = [
        [
            f"{row['model']}: {row['measure']}",
            f"{row['fp32']:.4g}",
            f"{row['int8']:.4g}",
            f"-{row['change']:.2f} {row['unit']}".replace("--", "+")
            if row["unit"] == "points"
            else f"{row['change']:.2f}{row['unit']}",
            "" if row["verdict"] == "stated" else row["verdict"],
        ]
        for row in rows
    ]
    table("Before and after", ["", "fp32", "INT8", "change", "gate"], cells)
    said = [
        [row["text"], row["label"], f"{row['score']:.2f}", f"{row['milliseconds']:.1f} ms"]
        for row in answers
    ]
    table("Five sentences, answered by the INT8 files", ["text", "intent", "score", ""], said)
