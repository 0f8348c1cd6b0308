"""Decoders as ONNX files: written, run in ONNX Runtime, and their checkpoints in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ExportOptions, Floats, Ids, Lowered, Silent, Target
from pocketglm.model.hf import load_decoder

TARGET: Target = registry.load("targets", "onnx")
ALL = ExportOptions(logits="all", threads=1)
LAST = ExportOptions(threads=1)
IDS: Ids = np.random.default_rng(0).integers(6, 96, (2, 9))
MASK: Ids = np.array([[1] * 9, [1] * 5 + [0] * 4])
NEXT: Ids = np.random.default_rng(1).integers(6, 96, (3, 2))


def lower(folder: Path, out: Path, options: ExportOptions = ALL) -> tuple[Lowered, Path]:
    out.mkdir()
    ckpt = Checkpoint.open(folder)
    assert TARGET.supports(ckpt, options) == []
    lowered = TARGET.lower(ckpt, out, options, Silent())
    return lowered, out / lowered.model_file


def open_file(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def empty_past(session: ort.InferenceSession, batch: int, slots: int = 0) -> dict[str, Floats]:
    return {
        port.name: np.zeros((batch, port.shape[1], slots, port.shape[3]), np.float32)
        for port in session.get_inputs()[2:]
    }


def run_file(file: Path, slots: int) -> list[Floats]:
    """Logits of two right-padded rows, then of three steps; `slots`: of the past's buffers."""
    session = open_file(file)
    past, ids, mask, found = empty_past(session, 2, slots), IDS, MASK, []
    for step in range(len(NEXT) + 1):
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        found.append(logits)
        past = dict(zip(past, present, strict=True))
        if step < len(NEXT):
            counts = mask.sum(1) + 1
            mask = (np.arange(mask.shape[1] + 1) < counts[:, None]).astype(np.int64)
            ids = NEXT[step][:, None]
    return found


@torch.inference_mode()
def run_torch(folder: Path) -> list[Floats]:
    """The same of the checkpoint in PyTorch, weights dequantized."""
    model = load_decoder(Checkpoint.open(folder))
    cache = model.new_cache(2)
    found = [model(torch.from_numpy(IDS), torch.from_numpy(MASK), cache)]
    found += [model.step(torch.from_numpy(ids), cache)[:, None] for ids in NEXT]
    return [logits.numpy() for logits in found]


def worst(found: list[Floats], wanted: list[Floats]) -> float:
    keep = MASK.astype(bool)
    pairs = [(found[0][keep], wanted[0][keep]), *zip(found[1:], wanted[1:], strict=True)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def nodes(file: Path, kind: str) -> list[onnx.NodeProto]:
    graph = onnx.load(str(file), load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
