"""model.litertlm: a decoder's file with tokenizer, chat template and stop tokens, for LiteRT-LM.

LiteRT-LM knows no GLM: every family is its `generic_model`, which takes the chat from the jinja
template. Its sampler is set to the most probable token, and activations to float32 (else fp16).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketglm.errors import require
from pocketglm.text.chat import read_template
from pocketglm.text.tokenizer import Tokenizer

BUNDLE = "model.litertlm"
_HEAD = 1 << 16  # bytes at the file's begin that hold its description
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
_NO_TIME = b"1970-01-01T00:00:00.000000+00:00"


def write_bundle(
    folder: Path, model: Path, *, context: int, bos_id: int | None, eos_ids: Sequence[int]
) -> None:
    """Write it into `folder`, which has the tokenizer; the same inputs give the same bytes.

    Raises:
        MissingExtraError: litert-lm-builder is not installed.
    """
    builder = require("litert_lm_builder.litertlm_builder", extra="litert")
    file = folder / "llm_metadata.pb"
    file.write_bytes(_metadata(folder, context, bos_id, eos_ids).SerializeToString())
    form = builder.Metadata(key="prefer_activation_type", value="fp32", dtype=builder.DType.STRING)
    bundle = builder.LitertLmFileBuilder()
    bundle.add_system_metadata(
        builder.Metadata(key="Authors", value="PocketGLM", dtype=builder.DType.STRING)
    )
    bundle.add_llm_metadata(str(file))
    bundle.add_hf_tokenizer(str(folder / "tokenizer.json"))
    bundle.add_tflite_model(
        str(model),
        builder.TfLiteModelType.PREFILL_DECODE,
        backend_constraint="cpu",
        additional_metadata=[form],
    )
    with (folder / BUNDLE).open("wb") as stream:
        bundle.build(stream)
    file.unlink()
    _settle(folder / BUNDLE)


def _metadata(folder: Path, context: int, bos_id: int | None, eos_ids: Sequence[int]) -> Any:
    proto = require("litert_lm_builder.runtime.proto.llm_metadata_pb2", extra="litert")
    found = proto.LlmMetadata()
    found.max_num_tokens = context
    if bos_id is not None and _begins(folder, bos_id):
        found.start_token.token_ids.ids.append(bos_id)
    for token in eos_ids:
        found.stop_tokens.add().token_ids.ids.append(token)
    sampler = found.sampler_params  # its own GREEDY is refused on the CPU (0.18)
    sampler.type, sampler.k, sampler.p, sampler.temperature = sampler.TOP_P, 1, 1.0, 1.0
    found.llm_model_type.generic_model.SetInParent()
    if template := read_template(folder):
        found.jinja_prompt_template = template
    return found


def _begins(folder: Path, bos_id: int) -> bool:
    """Whether the tokenizer puts this token before a text."""
    return bool(Tokenizer.load(folder).encode(["a"], 8).ids[0, 0] == bos_id)


def _settle(file: Path) -> None:
    """A fixed time, and an id that follows from the contents, in place of the builder's."""
    with file.open("r+b") as stream:
        head = _TIME.sub(_NO_TIME, stream.read(_HEAD))
        head = _UUID.sub(b"0" * 36, head)
        name = str(uuid.uuid5(uuid.NAMESPACE_OID, head.hex())).encode()
        stream.seek(0)
        stream.write(head.replace(b"0" * 36, name))
