"""Drop the tokens that a task never uses, from the embedding, the head and the tokenizer.

Corpus: the training rows and the files in `corpora`. Each of its texts has the same tokens
afterwards, under new numbers, and decodes to the same; the step fails if one does not
(`text/trim.py`). Held-out text: the validation rows, which choose nothing. How many more tokens
these become, and how many of them unknown, is in the step's effect; the fewer texts the corpus has,
the more. `extra` buys some of that back. Rows of the embedding and of the head are copied as they
are stored, a chunk at a time; so are all other weights.

The tokenizers of two models fit together no more: trim before training, and distill from a teacher
with the same vocabulary, or one that reads texts by itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo, read_json
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.contracts import Ids, ModelMethod, StepContext, TaskRows
from pocketglm.data.readers import read_texts
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.model.families import DECODERS
from pocketglm.model.hf import is_decoder, model_spec_of
from pocketglm.text import chat
from pocketglm.text.frame import clean, pieces, prompt
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.text.trim import (
    Choice,
    Trimmed,
    Unseen,
    measure,
    reasons,
    renumbered_config,
    trim,
)

_CHUNK = 1 << 22  # elements of a tensor in memory at a time
_TOKENIZER = 20  # bytes in memory for one of the tokenizer's files
_SPARE = 128 << 20  # encoded texts, and what the allocator keeps
_WEIGHTS = "model.safetensors"
_GENERATION = "generation_config.json"
# Tensors with a row for each token; BERT's pretraining head may lie beside a model.
_BY_TOKEN = re.compile(
    r"(^|\.)(word_embeddings|embed_tokens|lm_head)\.weight$"
    r"|(^|\.)cls\.predictions\.(bias|decoder\.(weight|bias))$"
)


class TrimConfig(Choice):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    corpora: list[str] = Field(
        [], description="further texts that keep their tokens: .txt, .jsonl[.gz] or .csv files"
    )


def _check(config: TrimConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is already quantized: trim the float checkpoint, then quantize"]
    found = [
        f"corpora: '{path}' is no file: give .txt, .jsonl[.gz] or .csv files"
        for path in config.corpora
        if not Path(path).is_file()
    ]
    if context.rows is None or not context.rows.train:
        found.append("there is no corpus: add --data with training rows of the task")
    try:
        return found + reasons(ckpt.path)
    except CheckpointError as error:
        return [*found, error.message]


def _predict(config: TrimConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    rows = _rows_of(ckpt)
    if rows != _rows_of(Checkpoint.open(ckpt.path)):
        return ckpt  # a step before this one trims, too: its tokenizer is not written yet
    kept = _trimmed(config, ckpt, context).kept
    tensors = {
        name: replace(info, shape=(len(kept), *info.shape[1:])) if _by_token(info, rows) else info
        for name, info in ckpt.tensors.items()
    }
    return replace(ckpt, config=_new_config(ckpt, kept), tensors=tensors)


def _run(
    config: TrimConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> dict[str, float]:
    rows = _rows_of(ckpt)
    trimmed = _trimmed(config, ckpt, context)
    unseen = measure(trimmed, _held_out(context))
    weights = {info.file for info in ckpt.tensors.values()}
    index = {file for file in ckpt.files if file.name.endswith(".safetensors.index.json")}
    for file in ckpt.files:
        if file in weights | index or file.name in trimmed.dropped:
            continue
        target = folder / file.relative_to(ckpt.path)
        target.parent.mkdir(exist_ok=True)
        if (text := trimmed.files.get(str(target.relative_to(folder)))) is not None:
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, target)
    write_json(folder / "config.json", _new_config(ckpt, trimmed.kept))
    if (file := ckpt.path / _GENERATION).is_file():
        write_json(folder / _GENERATION, renumbered_config(read_json(file), _places(trimmed.kept)))
    write_json(folder / MANIFEST, ckpt.manifest)
    _write_weights(ckpt, folder / _WEIGHTS, trimmed.kept, rows, context)
    return _effect(rows, trimmed, unseen)


def _trimmed(config: TrimConfig, ckpt: Checkpoint, context: StepContext) -> Trimmed:
    pinned: set[int] = set()

    def note(token: int) -> int:
        pinned.add(token)
        return token

    rows = _rows_of(ckpt)
    renumbered_config(_with_defaults(ckpt), note)
    if (file := ckpt.path / _GENERATION).is_file():
        renumbered_config(read_json(file), note)
    choice = Choice(**config.model_dump(exclude={"corpora"}))
    pinned = {token for token in pinned if 0 <= token < rows}
    return trim(ckpt.path, _corpus(config, ckpt, context), choice, rows, pinned)


def _effect(rows: int, trimmed: Trimmed, unseen: Unseen) -> dict[str, float]:
    corpus, before, after = trimmed.corpus, unseen.tokens_before, unseen.tokens
    effect = {
        "vocabulary_before": rows,
        "vocabulary": len(trimmed.kept),
        "corpus_texts": corpus.texts,
        "corpus_tokens": trimmed.tokens,
        "corpus_changed": corpus.changed / max(corpus.texts, 1),
        "corpus_lost": corpus.lost / max(corpus.texts, 1),
        "held_out_texts": unseen.texts,
        "held_out_changed": 1 - unseen.same / max(unseen.texts, 1),
        "held_out_longer": after / max(before, 1) - 1,
        "held_out_unknown_before": unseen.unknown_before / max(before, 1),
        "held_out_unknown": unseen.unknown / max(after, 1),
    }
    return {name: float(f"{value:.6g}") for name, value in effect.items()}


# --- texts ---------------------------------------------------------------------------------------


def _corpus(config: TrimConfig, ckpt: Checkpoint, context: StepContext) -> Iterator[str]:
    """What the model will read and write, as its task puts it to the tokenizer."""
    template = chat.read_template(ckpt.path) if is_decoder(ckpt) else None
    names: dict[str, Any] = dict(Tokenizer.load(ckpt.path).special_tokens) if template else {}
    if template:  # the words of the template itself
        yield _rendered(template, "hello", names)
    for row in _rows(context).train:
        yield from _texts_of(row, context)
        if context.task == "command":
            # Each word by itself, alone and behind a line break: see `text.frame.FrameTokens`.
            yield from (mark + word for word in pieces(clean(row.text)) for mark in ("", "\n"))
        elif getattr(row, "prompt", None) is not None:
            yield _rendered(template, row.prompt, names) if template else f"{row.prompt}\n"
    column = context.data.text_column if context.data else "text"
    for path in config.corpora:
        yield from read_texts(Path(path), column)


def _rows(context: StepContext) -> TaskRows:
    if context.rows is None:
        raise UsageError("trim_vocabulary needs rows of the task", "add --data DATA")
    return context.rows


def _texts_of(row: Any, context: StepContext) -> list[str]:
    if context.task == "command":
        return [prompt(row.text)]
    source = getattr(row, "prompt", None)
    return [row.text] if source is None else [source, row.text]


def _rendered(template: str, text: str, names: dict[str, Any]) -> str:
    return chat.render(template, [{"role": "user", "content": text}], **names)


def _held_out(context: StepContext) -> list[str]:
    return [text for row in _rows(context).validation for text in _texts_of(row, context)]


# --- the folder ----------------------------------------------------------------------------------


def _rows_of(ckpt: Checkpoint) -> int:
    return model_spec_of(ckpt).vocab_size


def _by_token(info: TensorInfo, rows: int) -> bool:
    return _BY_TOKEN.search(info.name) is not None and info.shape[0] == rows


def _with_defaults(ckpt: Checkpoint) -> dict[str, Any]:
    """config.json with the token ids that upstream assumes where it names none."""
    family = str(ckpt.config.get("family", ckpt.config["model_type"]))
    assumed: dict[str, Any] = DECODERS[family].DEFAULTS if family in DECODERS else {}
    ids = {key: value for key, value in assumed.items() if key.endswith("_token_id")}
    return {**ids, **ckpt.config}


def _new_config(ckpt: Checkpoint, kept: Ids) -> dict[str, Any]:
    config = renumbered_config(_with_defaults(ckpt), _places(kept))
    return dict(sorted((config | {"vocab_size": len(kept)}).items()))


def _places(kept: Ids) -> Callable[[int], int]:
    """Old id -> new one; an id without a row stays as it is."""
    place = {int(token): new for new, token in enumerate(kept)}
    return lambda token: place.get(token, token)


def _write_weights(
    ckpt: Checkpoint, file: Path, kept: Ids, rows: int, context: StepContext
) -> None:
    """All tensors, as they are stored; of those with a row for each token, the kept rows."""
    layout = {
        info.name: (
            info.dtype,
            (len(kept), *info.shape[1:]) if _by_token(info, rows) else info.shape,
        )
        for info in ckpt.tensors.values()
    }
    writer = safetensors.Writer(file, layout)
    for done, info in enumerate(ckpt.tensors.values(), 1):
        for chunk in _chunks(ckpt, info, kept if _by_token(info, rows) else None):
            writer.write(info.name, chunk)
        context.reporter.progress("trim", done, len(layout))
    writer.close()


def _chunks(ckpt: Checkpoint, info: TensorInfo, kept: Ids | None) -> Iterator[npt.NDArray[Any]]:
    count = info.shape[0] if info.shape else 1
    step = max(1, _CHUNK * count // max(info.size, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        chunk = ckpt.read(info.name, start, stop) if info.shape else ckpt.read(info.name)
        if kept is not None:
            first, last = np.searchsorted(kept, [start, stop])
            chunk = chunk[kept[first:last] - start]
        yield chunk


def _inputs(config: TrimConfig) -> Sequence[Path]:
    return [Path(path) for path in config.corpora]


def _memory(config: TrimConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """Two chunks of weights, and the tokenizer: its file is read, renumbered and opened again."""
    tokenizer = sum(f.stat().st_size for f in ckpt.files if f.suffix in (".json", ".txt"))
    return 2 * 8 * _CHUNK + _TOKENIZER * tokenizer + _SPARE


SPEC = ModelMethod(
    summary="drop the tokens that the task's texts never use, from model and tokenizer",
    config=TrimConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: True,
    inputs=_inputs,
    identity={"extra": 1_000_000},
    memory=_memory,
)
