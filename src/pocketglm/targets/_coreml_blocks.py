"""What the parts of a written Core ML package give, one after the other: see `contracts.Target`.

The package is computed from its files by the reference evaluator, in float32, without the rounding
of static activations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.contracts import Floats, Ids
from pocketglm.runtimes._coreml_eval import Evaluator
from pocketglm.runtimes._coreml_file import Function, Operation, Package, read_package
from pocketglm.targets._coreml_decoder import DECODE, PREFILL

_POSITIONS, _ROWS = 4096, 512  # of the tables, at a time
_END = re.compile(r"embeddings|block_\d+")
_TABLE = "embed_tokens_weight"


def has_decoder(file: Path) -> bool:
    """Whether a written file is a decoder's."""
    return DECODE in read_package(file).functions


def encoder_blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """ids, mask [B, S] -> values after `embeddings` and each `block.I` [B, S, H]; `head` [B, C]."""
    package = without_rounding(read_package(file))
    function = package.function()
    evaluator = Evaluator(package, precision="float32")
    length, count = ids.shape[1], function.inputs["input_ids"].type.shape[1] or ids.shape[1]
    ends = _ends(function)
    rows = []
    for row, keep in zip(ids, mask, strict=True):
        padded = {
            name: np.pad(values, (0, count - length))[None].astype(np.int32)
            for name, values in (("input_ids", row), ("attention_mask", keep))
        }
        found = evaluator.run(padded, watch=ends)
        head = next(found[name] for name in function.outputs)
        rows.append([*(_states(found[end])[:length] for end in ends), head[0]])
    for name, *values in zip((*ends, "head"), *rows, strict=True):
        yield name.replace("_", "."), np.stack(values).astype(np.float32)


def decoder_blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """ids, mask [B, S]: the tables, then the values of the parts."""
    package = without_rounding(read_package(file))
    yield from _tables(package)
    prefill, decode = (Evaluator(package, n, precision="float32") for n in (PREFILL, DECODE))
    ends = _ends(package.function(PREFILL))
    count = package.function(PREFILL).inputs["input_ids"].type.shape[1] or 1
    rows, heads = [], []
    for row, keep in zip(ids, mask, strict=True):
        state, parts = prefill.new_state(), []
        padded = np.pad(row, (0, -len(row) % count)).astype(np.int32)
        for start in range(0, len(padded), count):
            found = prefill.run(_call(padded[start : start + count], start), state, watch=ends)
            parts.append([_states(found[end]) for end in ends])
        rows.append([np.concatenate(p)[: len(row)] for p in zip(*parts, strict=True)])
        last = int(keep.sum()) - 1  # its keys and values are written again
        heads.append(decode.run(_call(row[last : last + 1], last), state)["logits"][0, -1])
    for name, *values in zip(ends, *rows, strict=True):
        yield name.replace("_", "."), np.stack(values).astype(np.float32)
    yield "head", np.stack(heads).astype(np.float32)


def _call(tokens: Any, start: int) -> dict[str, Any]:
    return {
        "input_ids": np.asarray(tokens, np.int32)[None],
        "position": np.array([start], np.int32),
    }


def _ends(function: Function) -> tuple[str, ...]:
    """The values that parts of the model end with, in order."""
    names = [name for operation in function.operations for name, _ in operation.outputs]
    return tuple(name for name in names if _END.fullmatch(name))


def _states(x: Any) -> Any:
    """[1, S, H] or [1, H, 1, S] -> [S, H]."""
    return x[0] if x.ndim == 3 else x[0, :, 0].T


def _tables(package: Package) -> Iterator[tuple[str, Floats]]:
    """Rows of an embedding that is not the head, and the rotary tables."""
    cos, sin = (package.stored(f"rotary_{k}", DECODE)["val"] for k in ("cos", "sin"))
    operations = package.function(DECODE).operations
    axis = next(_axis(o, operations) for o in operations if _reads(o, "rotary_cos"))
    cos, sin = (np.asarray(t.T if axis else t, np.float32) for t in (cos, sin))
    for start in range(0, len(cos), _POSITIONS):
        stop = min(start + _POSITIONS, len(cos))
        yield f"rotary.{start}:{stop}", np.stack([cos[start:stop], sin[start:stop]])
    table = next(n for o in operations for n, _ in o.outputs if n.endswith(_TABLE))
    if sum(_reads(o, table) for o in operations) > 1:
        return  # the head reads it too
    yield from _rows(package.stored(table, DECODE))


def _rows(stored: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    """A table from what is stored of it: values, or integers, scales and offsets [N, G]."""
    data = stored["val"] if "val" in stored else stored["data"]
    data = data.reshape(len(data), -1)
    for start in range(0, len(data), _ROWS):
        stop = min(start + _ROWS, len(data))
        rows = data[start:stop].astype(np.float32)
        for key, sign in (("offset", -1), ("scale", 0)):
            if key in stored:
                part = stored[key][start:stop].reshape(stop - start, -1).astype(np.float32)
                part = np.repeat(part, rows.shape[1] // part.shape[1], axis=1)
                rows = rows + sign * part if sign else rows * part
        yield f"rows.{start}:{stop}", rows


def _reads(operation: Operation, name: str) -> bool:
    return any(name in names for names in operation.inputs.values())


def _axis(operation: Operation, operations: Sequence[Operation]) -> int:
    """Of a gather."""
    (name,) = operation.inputs["axis"]
    constant = next(o.value for o in operations if o.name == name and o.value)
    return int(constant.read())


def without_rounding(package: Package) -> Package:
    """The same program without `quantize` and `dequantize`."""
    functions = {name: _plain(function) for name, function in package.functions.items()}
    return replace(package, functions=functions)


def _plain(function: Function) -> Function:
    instead: dict[str, str] = {}
    kept = []
    for operation in function.operations:
        if operation.type in ("quantize", "dequantize"):
            source = str(operation.inputs["input"][0])
            instead[operation.name] = instead.get(source, source)
            continue
        inputs = {
            key: tuple(instead.get(v, v) if isinstance(v, str) else v for v in values)
            for key, values in operation.inputs.items()
        }
        kept.append(replace(operation, inputs=inputs))
    return replace(function, operations=tuple(kept))
