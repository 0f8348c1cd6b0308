"""What a folder is: size by part, precision, labels, lineage, and what opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.proof import PROOF
from pocketglm.artifacts.schemas import InspectResult
from pocketglm.cli._common import Json, emit, megabytes
from pocketglm.stages.inspect import inspect_path

_LOGITS = {"last": "of the last token", "all": "of every token"}


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint, export or proof folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare an export's files with their sha256.")
    ] = False,
    json: Json = False,
) -> None:
    """Describe the artifact in PATH."""
    result = inspect_path(model_folder(path), verify=verify)
    emit(result, json, lambda: show(result))


def show(result: InspectResult) -> None:
    """The description as a person reads it."""
    rows = [["kind", result.kind], ["bytes", f"{megabytes(result.bytes)} ({result.bytes:,})"]]
    shapes = (
        ("architecture", result.architecture),
        ("parameters", f"{result.parameters:,}" if result.parameters else ""),
        ("precision", result.precision),
        ("layers x hidden x heads", _shape(result)),
        ("heads by layer", ", ".join(map(str, result.layer_heads))),
        ("FFN by layer", ", ".join(map(str, result.layer_ffn))),
        ("factorized", _ranks(result)),
        ("blocks", _blocks(result)),
        ("attention", f"to the {result.top_k} keys of the largest scores" if result.top_k else ""),
        ("key/value heads", _cache(result)),
        ("vocabulary", f"{result.vocab_size:,}" if result.vocab_size else ""),
        ("context" if result.kv_bytes_per_token else "max length", _length(result)),
        ("logits", _LOGITS.get(result.logits or "", "")),
        ("pooling, head", ", ".join(filter(None, [result.pooling, result.head]))),
        ("labels", _labels(result.labels)),
        ("intents", _labels(list(result.command or ()))),
        ("end of text", _ends(result)),
    )
    rows += [[name, value] for name, value in shapes if value]
    rows += [[f"bytes of {part}", megabytes(size)] for part, size in result.parts.items() if size]
    rows += [["scheme", f"{count} tensors {name}"] for name, count in result.schemes.items()]
    rows += [[f"opens in {name}", answer] for name, answer in result.opens_in.items()]
    rows += [
        [f"step {index}", f"{step.method} {_settings(step.settings)}"]
        for index, step in enumerate(result.lineage, 1)
    ]
    if result.export:
        parity = result.export["parity"]
        rows.append(["target", f"{result.export['target']} ({result.export['model_file']})"])
        needs = [f"{name} {version}" for name, version in result.export["minimum"].items()]
        rows.append(["needs", ", ".join([*needs, *result.export["links"]])])
        rows.append(["parity", f"{parity['output_max_abs']:.2g} over {parity['n']} rows"])
    if result.proof:
        rows.append(["verdict", f"{result.proof['verdict']} ({PROOF})"])
    rows += [["note", note] for note in result.notes]
    rows.append(["sha256", result.digest])
    print(result.path)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _settings(settings: dict[str, Any]) -> str:
    """The settings that are set; --json has them all."""
    return ", ".join(f"{k}={v}" for k, v in settings.items() if v not in (None, [], False))


def _shape(result: InspectResult) -> str:
    if result.hidden_size is None:
        return ""
    size = f" of {result.head_dim}" if result.head_dim and not result.kv_heads else ""
    return f"{result.layers} x {result.hidden_size} x {result.heads}{size}"


def _blocks(result: InspectResult) -> str:
    parts = ["attention and FFN side by side"] if result.unified else []
    if shared := result.layer_blocks:
        parts.insert(0, f"{max(shared) + 1}, by layer {', '.join(map(str, shared))}")
    return "; ".join(parts)


def _length(result: InspectResult) -> str:
    if not result.max_length:
        return ""
    what = ", prompt and answer together" if result.kv_bytes_per_token else ""
    return f"{result.max_length:,} tokens{what}"


def _ends(result: InspectResult) -> str:
    if result.kv_bytes_per_token is None:
        return ""
    ids = ", ".join(map(str, result.eos_ids))
    return f"token {ids}" if ids else "no token: an answer ends at its limit only"


def _ranks(result: InspectResult) -> str:
    """How many linear layers are products of two, and of what ranks."""
    ranks = [rank for layer in result.layer_ranks for rank in layer.values()]
    if not ranks:
        return ""
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    return f"{len(ranks)} linear layers, rank {span}"


def _cache(result: InspectResult) -> str:
    if result.kv_bytes_per_token is None:
        return ""
    size = result.kv_bytes_per_token / 1024
    return (
        f"{result.kv_heads} of {result.head_dim}; cache {size:g} KiB a token in {result.kv_cache}"
    )


def _labels(labels: list[str]) -> str:
    if not labels:
        return ""
    shown = ", ".join(labels[:6])
    return f"{len(labels)}: {shown}{', ...' if len(labels) > 6 else ''}"


SPEC = main
