"""Reads the quantized weights of a .pte file of BERT, by ExecuTorch's own schemas alone.

The file names no weight: they are told apart by the order in which a text meets them.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

REASON = "needs the extra 'executorch'"
Array = npt.NDArray[Any]
_LAYERS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


class Weight(NamedTuple):
    """q int8 [N, K], scales float32 [N, G], zeros [N, G] or None; data: where q is in the file."""

    q: Array
    scales: Array
    zeros: Array | None
    data: bytes


def read_weights(file: Path) -> dict[str, Weight]:
    """By the names that a checkpoint of BERT has, any more by number."""
    found = list(_products(file))
    names = [f"encoder.layer.{i}.{part}" for i in range(len(found) // 6) for part in _LAYERS]
    names += ["pooler.dense", *(f"product.{i}" for i in range(len(names) + 1, len(found)))]
    weights = {f"{n}.weight": w for n, w in zip(names, found, strict=False) if w is not None}
    for words in _tables(file):
        weights["embeddings.word_embeddings.weight"] = words
    return weights


def flip(file: Path, name: str, place: int) -> None:
    """Change the lowest bit of one stored byte of a weight."""
    raw, data = bytearray(file.read_bytes()), read_weights(file)[name].data
    start = raw.find(data)
    assert start >= 0
    raw[start + place] ^= 1
    file.write_bytes(raw)


def _program(file: Path) -> tuple[Any, Any, Any]:
    from executorch.exir._serialize._program import deserialize_pte_binary

    found = deserialize_pte_binary(file.read_bytes())
    plan = next(p for p in found.program.execution_plan if p.name == "forward")
    return found.program, found.named_data, plan


def _products(file: Path) -> Iterator[Weight | None]:
    """The linear layers' weights in their order; None: it is float."""
    program, named, plan = _program(file)
    restored: dict[int, Weight] = {}
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if type(call).__name__ == "DelegateCall":
            reference = plan.delegates[call.delegate_index].processed
            data = bytes(program.backend_delegate_data[reference.index].data)
            graph = _graph(data)
            _pass_on(graph, call.args, restored)
            yield from _connected(graph, named)
            continue
        name = plan.operators[call.op_index].name
        if name == "quantized_decomposed::dequantize_per_channel":
            q, scales, zeros = (_stored(program, plan, i) for i in call.args[:3])
            restored[call.args[-1]] = Weight(q, scales[:, None], _some(zeros[:, None]), q.tobytes())
        elif name in ("aten::mm", "aten::addmm"):
            yield next(restored[i] for i in call.args if i in restored)
        else:  # a transposed or reshaped one is the same
            for i in call.args:
                if i in restored:
                    restored[call.args[-1]] = restored[i]


def _pass_on(graph: Any, args: list[int], restored: dict[int, Weight]) -> None:
    """XNNPACK transposes weights that a kernel outside of it has restored."""
    unions = (entry["xvalue_union"] for entry in graph["xvalues"])
    tensors = [union.get("tensor_value", union) for union in unions]
    place = {t["id_out"]: t["external_id"] for t in tensors}
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNStaticTranspose":
            ends = [place[node["xnode_union"][key]] for key in ("input_id", "output_id")]
            if max(ends) < len(args) and args[ends[0]] in restored:
                restored[args[ends[1]]] = restored[args[ends[0]]]


def _tables(file: Path) -> Iterator[Weight]:
    program, _, plan = _program(file)
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if type(call).__name__ != "KernelCall":
            continue
        name = plan.operators[call.op_index].name
        if name not in (
            "quantized_decomposed::embedding_byte",
            "quantized_decomposed::embedding_4bit",
        ):
            continue
        q, scales = (_stored(program, plan, i) for i in call.args[:2])
        data = q.tobytes()
        none = type(plan.values[call.args[2]].val).__name__ == "Null"
        zeros = None if none else _some(_stored(program, plan, call.args[2]))
        if name.endswith("4bit"):  # the first one is high
            q = (np.stack([q >> 4, q & 15], -1).reshape(len(q), -1).astype(np.int8)) - 8
        yield Weight(q, scales, zeros, data)


def _some(zeros: Array) -> Array | None:
    return zeros if zeros.any() else None


def _stored(program: Any, plan: Any, place: int) -> Array:
    value = plan.values[place].val
    raw = program.constant_buffer[value.data_buffer_idx].storage
    kinds = {"BYTE": np.uint8, "CHAR": np.int8, "LONG": np.int64, "FLOAT": np.float32}
    count = int(np.prod(value.sizes))
    found: Array = np.frombuffer(raw, kinds[value.scalar_type.name], count)
    return found.reshape(value.sizes)


def _connected(graph: Any, named: Any) -> Iterator[Weight | None]:
    values = {}
    for entry in graph["xvalues"]:
        union = entry["xvalue_union"]
        values[union.get("tensor_value", union)["id_out"]] = union
    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        union = values[node["xnode_union"]["filter_id"]]
        tensor = union.get("tensor_value", union)
        rows, columns = tensor["dims"]
        if rows == 1:  # the mean of a norm
            continue
        if tensor["datatype"] == "xnn_datatype_fp32":
            yield None
            continue
        data = _named(graph, named, tensor["constant_buffer_idx"])
        scales = _named(graph, named, union["quant_params"]["scale_buffer_idx"])
        if tensor["datatype"] == "xnn_datatype_qcint8":
            q = np.frombuffer(data, np.int8, rows * columns).reshape(rows, columns)
            floats = np.frombuffer(scales, np.float32, rows)[:, None]
        else:
            assert tensor["datatype"] == "xnn_datatype_qbint4"
            packed = np.frombuffer(data, np.uint8, rows * columns // 2).reshape(rows, -1)
            q = np.stack([packed & 15, packed >> 4], -1).reshape(rows, columns).astype(np.int8) - 8
            groups = columns // union["quant_params"]["group_size"]
            halves = np.frombuffer(scales, np.uint16, rows * groups).astype(np.uint32) << 16
            floats = halves.view(np.float32).reshape(rows, groups)
        yield Weight(q, floats, None, data)


def _named(graph: Any, named: Any, index: int) -> bytes:
    entry = named.pte_data[graph["constant_data"][index]["named_key"]]
    return bytes(named.buffers[entry.buffer_index])


def _graph(data: bytes) -> Any:
    """XNNPACK's graph, by the schema and the flatc that come with ExecuTorch."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    start, size = struct.unpack_from("<II", data, 10)
    schema = resources.files("executorch.backends.xnnpack.serialization") / "schema.fbs"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "schema.fbs").write_bytes(schema.read_bytes())
        (place / "g.bin").write_bytes(data[start : start + size])
        _flatc_decompile(folder, f"{folder}/schema.fbs", f"{folder}/g.bin", ["--raw-binary"])
        return json.loads(re.sub(r"(?<=[ -])inf\b", "Infinity", (place / "g.json").read_text()))
