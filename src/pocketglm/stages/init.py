"""A new checkpoint of a family size: random weights, written tensor by tensor, and a tokenizer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import torch

from pocketglm.artifacts.checkpoint import Checkpoint, model_folder
from pocketglm.artifacts.manifest import (
    Manifest,
    Step,
    digest_file,
    digest_value,
    tool_versions,
    write_json,
)
from pocketglm.artifacts.output import free_bytes, is_done, output_folder
from pocketglm.artifacts.schemas import InitResult
from pocketglm.contracts import Reporter, Silent
from pocketglm.data.texts import vocabulary_texts
from pocketglm.data.tokenizer_training import (
    CHAT_EOS,
    PAD,
    byte_tokenizer,
    save_chat_tokenizer,
    train_bpe,
)
from pocketglm.errors import DiskFullError, UsageError
from pocketglm.model.decoder import initial_values
from pocketglm.model.hf import write_decoder
from pocketglm.model.sizes import shapes, spec_of_size
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import as_array
from pocketglm.text.tokenizer import TOKENIZER_FILES, Tokenizer

Dtype = Literal["float32", "bfloat16", "float16"]
INIT_STD = 0.02  # GPT-2's, and that of every family here


def init(
    size: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    tokenizer_data: Path | None = None,
    text_column: str = "text",
    force: bool = False,
    reporter: Reporter | None = None,
) -> InitResult:
    """Write a new model of `size` into `out`; the same arguments give the same bytes.

    vocab_size: rows of the embedding (default: the size's). tokenizer: a folder to copy one from;
    tokenizer_data: texts to train a byte-level BPE on, as `data.texts.vocabulary_texts` reads them;
    neither: one token a byte. Memory beside the texts is that of a chunk of one tensor.

    Raises:
        UsageError: no such size, both kinds of tokenizer, or a vocabulary that is too small.
        DataError, CheckpointError: the texts, or the tokenizer, cannot be read.
        DiskFullError: checked before the work begins.
        OutputExistsError, LockedError: as `artifacts.output.output_folder`.
    """
    spec, reporter = spec_of_size(size, vocab_size), reporter or Silent()
    if tokenizer and tokenizer_data:
        raise UsageError(
            "--tokenizer and --tokenizer-data exclude each other",
            "copy a tokenizer, or train one",
        )
    texts = vocabulary_texts(tokenizer_data, text_column) if tokenizer_data else None
    request = digest_value(
        {
            "verb": "init",
            "size": [size, spec.vocab_size],
            "seed": seed,
            "dtype": dtype,
            "tokenizer": _source_digest(tokenizer, texts),
            "column": text_column,
            "version": tool_versions()["pocketglm"],
        }
    )
    origin = str(tokenizer) if tokenizer else "trained" if tokenizer_data else "bytes"
    inputs = [source for source in (tokenizer, tokenizer_data) if source and source.exists()]
    already = is_done(out, request, force, inputs)
    if not already:
        _require_space(out, spec, dtype)
        with output_folder(out, request, force, inputs) as folder:
            _write_tokenizer(folder, spec, tokenizer, texts)
            spec = _with_ids(spec, folder)
            kind = "copied" if tokenizer else origin  # not where it lay: same files, same bytes
            settings = {"size": size, "vocab_size": spec.vocab_size, "tokenizer": kind}
            step = Step(method="init", settings=settings, seed=seed, versions=tool_versions())
            _write_model(
                spec, folder, seed, dtype, Manifest(request=request, lineage=[step]), reporter
            )
    ckpt = Checkpoint.open(out)
    return InitResult(
        out=str(out),
        already_done=already,
        size=size,
        parameters=sum(map(math.prod, shapes(spec).values())),
        bytes=ckpt.nbytes,
        dtype=dtype,
        seed=seed,
        vocab_size=spec.vocab_size,
        tokenizer=origin,
        tokens=Tokenizer.load(out).size,
    )


def _source_digest(tokenizer: Path | None, texts: list[str] | None) -> str | None:
    if tokenizer:
        file = model_folder(tokenizer) / "tokenizer.json"
        return digest_file(file) if file.is_file() else None
    return None if texts is None else digest_value(texts)


def _require_space(out: Path, spec: DecoderSpec, dtype: Dtype) -> None:
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    needed = sum(map(math.prod, shapes(spec).values())) * width
    free = free_bytes(out.absolute())
    if needed > free:
        raise DiskFullError(
            f"{out} needs {needed:,} bytes, the disk has {free:,} bytes free",
            "free some space, or choose another --out",
        )


def _write_tokenizer(
    folder: Path, spec: DecoderSpec, source: Path | None, texts: list[str] | None
) -> None:
    """Copy, train or make the tokenizer; it must fit the embedding."""
    if source:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    else:
        made = train_bpe(texts, spec.vocab_size) if texts else byte_tokenizer()
        save_chat_tokenizer(made, folder, spec.max_position_embeddings)
    size = Tokenizer.load(folder).size
    if size > spec.vocab_size:
        rounded = -(-size // 128) * 128
        raise UsageError(
            f"the tokenizer has {size} tokens, the model's embedding {spec.vocab_size} rows",
            f"--vocab-size {rounded} (a multiple of 128)",
        )


def _with_ids(spec: DecoderSpec, folder: Path) -> DecoderSpec:
    """`spec` with the padding and end tokens of the folder's tokenizer."""
    tokenizer = Tokenizer.load(folder)
    named = tokenizer.config.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    found = (tokenizer.inner.token_to_id(str(n)) for n in dict.fromkeys((named, *CHAT_EOS)) if n)
    eos = tuple(number for number in found if number is not None)
    pad = tokenizer.inner.token_to_id(PAD)
    return replace(spec, eos_ids=eos, pad_id=tokenizer.pad_id if pad is None else pad)


def _write_model(
    spec: DecoderSpec,
    folder: Path,
    seed: int,
    dtype: Dtype,
    manifest: Manifest,
    reporter: Reporter,
) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    sizes = shapes(spec)
    order = list(sizes)

    def values(name: str) -> Iterator[npt.NDArray[Any]]:
        for chunk in initial_values(name, sizes[name], seed, INIT_STD):
            yield as_array(torch.from_numpy(chunk).to(kind))
        reporter.progress("init", order.index(name) + 1, len(order), name)

    write_decoder(spec, folder, values, source=None, manifest=manifest, dtype=kind)
    ids = list(spec.eos_ids)
    write_json(
        folder / "generation_config.json", {"eos_token_id": ids, "pad_token_id": spec.pad_id}
    )
