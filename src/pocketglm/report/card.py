"""The model card (`README.md`) of a proved export: Markdown with the front matter that hubs read.

Every number comes from the Proof, with its n and interval; what is not known is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from pocketglm.artifacts.proof import Proof
from pocketglm.report import _format, markdown
from pocketglm.report.markdown import cell

# What Transformers.js calls the precision, by the name of the file it opens.
_DTYPES = {"model": "fp32", "model_quantized": "q8", "model_q4": "q4"}
_USES = {
    "intent": "Finds the intent of one short utterance among its fixed labels, on the device.",
    "embed": "Turns a short text into a unit-length embedding, for search and clustering on the "
    "device.",
    "command": "Reads one short command as an intent, its slots and an action, on the device. An "
    "action may be wrong: ask before one that cannot be undone.",
    "lm": "Continues a text, on the device. What it writes may be false: perplexity measures how "
    "likely a text is, not whether it is true.",
}
_PIPELINES = {"intent": "text-classification", "embed": "sentence-similarity"}

_GENAI = """\
import onnxruntime_genai as genai

model = genai.Model("model")
tokenizer = genai.Tokenizer(model)
options = genai.GeneratorParams(model)
options.set_search_options(max_length=LENGTH)
generator = genai.Generator(model, options)
generator.append_tokens(tokenizer.encode("your text"))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
"""


def render(proof: Proof) -> str:
    """The whole card."""
    name = str(proof.candidate.get("name", "model"))
    sections = [
        _front_matter(proof),
        f"# {cell(name)}",
        f"{cell(_format.precision(proof.candidate))}, made and measured with PocketGLM. "
        f"Verdict of its proof: **{proof.verdict}**.",
        _about(proof),
        "## Measured\n\n"
        f"Against {cell(_format.precision(proof.baseline))} "
        f"({cell(proof.baseline.get('name', ''))}), {_format.scored(proof)} of "
        f"{cell(proof.data.get('path', ''))} (sha256 {str(proof.data.get('digest', ''))[:12]}).\n\n"
        + markdown.table(proof).rstrip(),
        _use(proof),
        _run(proof),
        _provenance(proof),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(proof: Proof) -> str:
    side = proof.candidate
    target = str(side.get("target", ""))
    head: dict[str, Any] = {"license": side.get("license") or "unknown"}
    if proof.data.get("language"):
        head["language"] = proof.data["language"]
    if side.get("base_model"):
        head["base_model"] = side["base_model"]
    decoder = _format.is_decoder(proof)
    if target == "onnx" and not decoder:
        head["library_name"] = "transformers.js"
    head["pipeline_tag"] = (
        "text-generation" if decoder else _PIPELINES.get(proof.task, "sentence-similarity")
    )
    genai = "onnxruntime-genai" if target == "onnx" and decoder else ""
    tags = (target, str(side.get("precision", "")), proof.task, genai, "pocketglm")
    head["tags"] = [tag for tag in tags if tag]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _about(proof: Proof) -> str:
    side = proof.candidate
    rows = [
        ("base model", side.get("base_model") or "unknown"),
        ("licence", side.get("license") or "unknown: ask whoever made the base model"),
        ("precision", side.get("precision", "")),
        ("model file", f"{side.get('model_file', '')}, {_megabytes(side.get('model_bytes'))}"),
        *(_about_decoder(side) if _format.is_decoder(proof) else _about_encoder(side)),
    ]
    lines = [f"| {key} | {cell(value)} |" for key, value in rows]
    return "| | |\n|---|---|\n" + "\n".join(lines)


def _about_encoder(side: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels: Sequence[str] = side.get("labels", [])
    return [
        ("maximum length", f"{side.get('max_length', '')} tokens; longer texts are cut"),
        ("pooling", side.get("pooling") or "none"),
        _activations(side),
        ("labels", f"{len(labels)}: {_list(labels)}" if labels else "none: it gives embeddings"),
    ]


def _activations(side: Mapping[str, Any]) -> tuple[str, str]:
    return "activations", side.get("activation") or "none"


def _about_decoder(side: Mapping[str, Any]) -> list[tuple[str, str]]:
    intents: Sequence[str] = side.get("intents", [])
    positions = {"last": "the last position", "all": "all positions"}
    rows = [
        ("context", f"{side.get('max_length', '')} tokens, prompt and answer together"),
        ("cache", f"{side.get('cache_bytes_per_token') or 'unknown'} bytes per token"),
        ("logits", f"of {positions.get(str(side.get('logits')), 'unknown positions')}"),
        _activations(side),
    ]
    return [*rows, ("intents", f"{len(intents)}: {_list(intents)}")] if intents else rows


def _megabytes(count: Any) -> str:
    return _format.megabytes(float(count)) if count else "size unknown"


def _list(labels: Sequence[str], most: int = 40) -> str:
    more = f", and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def _use(proof: Proof) -> str:
    use = _USES.get(proof.task, f"Made for the task {cell(proof.task)}.")
    return (
        f"## Intended use\n\n{use} The numbers above hold for texts like those of the test rows; "
        "other languages, longer texts and other wording were not measured. It is not meant for "
        "decisions about people."
    )


def _run(proof: Proof) -> str:
    if proof.candidate.get("target") != "onnx":
        return "## Run\n\n```sh\npocketglm run ./model 'your text'\n```"
    if proof.task == "command":
        return (
            "## Run\n\n`./model` is the exported folder.\n\n```sh\npocketglm run ./model "
            "'your command'\n```\n\nIts answer is the command once more with a mark behind every "
            "word, which is decoded so that nothing else can be written."
        )
    if _format.is_decoder(proof):
        length = min(256, int(proof.candidate.get("max_length") or 256))
        return (
            "## Run\n\n`./model` is the exported folder.\n\n```sh\npocketglm run ./model "
            f"'your text'\n```\n\nONNX Runtime GenAI:\n\n```python\n"
            f"{_GENAI.replace('LENGTH', str(length))}```"
        )
    file = str(proof.candidate.get("model_file", "onnx/model.onnx"))
    dtype = _DTYPES.get(PurePosixPath(file).stem, "fp32")
    labels = bool(proof.candidate.get("labels"))
    return (
        "## Run\n\n`./model` is the exported folder.\n\n```sh\npocketglm run ./model 'your text'\n"
        f"```\n\nONNX Runtime:\n\n```python\n{_python(file, labels)}```\n\n"
        f"Transformers.js:\n\n```js\n{_script(dtype, labels)}```"
    )


def _python(file: str, labels: bool) -> str:
    last = (
        'config = json.loads(Path("model/config.json").read_text())\n'
        'print(config["id2label"][str(int(output[0].argmax()))])\n'
        if labels
        else "print(output[0])  # unit length\n"
    )
    imports = "import json\nfrom pathlib import Path\n\n" if labels else ""
    return (
        f"{imports}import numpy as np\nimport onnxruntime\nfrom tokenizers import Tokenizer\n\n"
        'row = Tokenizer.from_file("model/tokenizer.json").encode("your text")\n'
        f'session = onnxruntime.InferenceSession("model/{file}")\n'
        "(output,) = session.run(None, {\n"
        '    "input_ids": np.array([row.ids], np.int64),\n'
        '    "attention_mask": np.array([row.attention_mask], np.int64),\n})\n' + last
    )


def _script(dtype: str, labels: bool) -> str:
    if labels:
        return (
            'import { env, pipeline } from "@huggingface/transformers";\n\n'
            'env.localModelPath = "./";\nenv.allowRemoteModels = false;\n'
            'const classify = await pipeline("text-classification", "model", '
            f'{{ dtype: "{dtype}" }});\n'
            'console.log(await classify("your text"));\n'
        )
    return (
        'import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";\n\n'
        'env.localModelPath = "./";\nenv.allowRemoteModels = false;\n'
        'const tokenizer = await AutoTokenizer.from_pretrained("model");\n'
        f'const model = await AutoModel.from_pretrained("model", {{ dtype: "{dtype}" }});\n'
        'const { sentence_embedding } = await model(await tokenizer(["your text"]));\n'
        "console.log(sentence_embedding.tolist());\n"
    )


def _provenance(proof: Proof) -> str:
    lineage: Sequence[Mapping[str, Any]] = proof.candidate.get("lineage", [])
    lines = []
    for index, step in enumerate(lineage, 1):
        settings = ", ".join(f"{k}={v}" for k, v in (step.get("settings") or {}).items())
        parent = f" from {str(step['parent'])[:12]}" if step.get("parent") else ""
        lines.append(f"{index}. {cell(step.get('method', ''))}{parent}: {cell(settings) or '-'}")
    steps = "\n".join(lines) or "No step is recorded."
    return (
        f"## Provenance\n\n{steps}\n\n"
        f"- export: sha256 {cell(proof.candidate.get('digest', 'unknown'))}\n"
        f"- checkpoint: sha256 {cell(proof.candidate.get('checkpoint', 'unknown'))}\n"
        f"- baseline: sha256 {cell(proof.baseline.get('digest', 'unknown'))}\n"
        f"- test rows: sha256 {cell(proof.data.get('digest', 'unknown'))}"
    )
