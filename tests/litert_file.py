"""Reads .tflite files with the format's generated classes alone; nothing of ours takes part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
REASON = "needs the extra: pip install 'pocketglm[litert]'"


def litert() -> Any:
    """LiteRT's interpreter module; skips the test where it is not installed."""
    return pytest.importorskip("ai_edge_litert.interpreter", reason=REASON)


@dataclass
class Stored:
    """A quantized constant: integers [N, K], scales [N, G]; `at` and `size`: its bytes."""

    q: Array
    scales: Array
    at: int
    size: int


def model_of(file: Path) -> Any:
    schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=REASON)
    return schema.ModelT.InitFromPackedBuf(bytearray(file.read_bytes()), 0)


def read_weights(file: Path) -> dict[str, Stored]:
    """The quantized matrices of all subgraphs, by name."""
    raw, model = np.frombuffer(file.read_bytes(), np.uint8), model_of(file)

    def data(tensor: Any) -> Array:
        buffer = model.buffers[tensor.buffer]
        if buffer.offset > 1:
            return raw[buffer.offset : buffer.offset + buffer.size]
        return np.asarray(buffer.data, np.uint8)

    found = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            grid = tensor.quantization
            if grid is None or len(tensor.shape) != 2:
                continue
            buffer = model.buffers[tensor.buffer]
            if not (buffer.offset or (buffer.data is not None and len(buffer.data))):
                continue
            rows, columns = (int(n) for n in tensor.shape)
            q = data(tensor).view(np.int8)
            if tensor.type == 17:  # INT4: the first of two is in the low nibble
                q = np.stack([q << 4 >> 4, q >> 4], axis=-1)
            if grid.details is not None:
                scales = data(graph.tensors[grid.details.scales]).view(np.float16)
                assert grid.details.zeroPoints == -1
                assert columns == grid.details.blockSize * (scales.size // rows)
            else:
                scales = np.asarray(grid.scale, np.float32)
                assert grid.quantizedDimension == 0
                assert not np.any(grid.zeroPoint)
            found[tensor.name.decode()] = Stored(
                q.reshape(rows, columns),
                scales.reshape(rows, -1).astype(np.float32),
                buffer.offset,
                buffer.size,
            )
    return found


def flip(file: Path, name: str, place: int) -> None:
    """Change the lowest bit of one byte of a constant."""
    stored, raw = read_weights(file)[name], bytearray(file.read_bytes())
    raw[stored.at + place] ^= 1
    file.write_bytes(bytes(raw))


def run(file: Path, feeds: dict[str, Array], *, delegate: bool = True) -> Array:
    """The first output of a file with one graph, its inputs resized to the feeds."""
    module = litert()
    kinds = module.OpResolverType
    model = module.Interpreter(
        model_path=str(file),
        num_threads=1,
        experimental_op_resolver_type=kinds.AUTO
        if delegate
        else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    places = {d["name"]: d["index"] for d in model.get_input_details()}
    for name, index in places.items():
        value = next(v for key, v in feeds.items() if name.endswith(key))
        model.resize_tensor_input(index, value.shape)
        feeds[name] = value
    model.allocate_tensors()
    for name, index in places.items():
        model.set_tensor(index, feeds[name])
    model.invoke()
    result: Array = model.get_tensor(model.get_output_details()[0]["index"])
    return result


def alone(file: Path, signature: str) -> bytes:
    """A copy of a file with one of its graphs alone."""
    schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=REASON)
    flatbuffers: Any = pytest.importorskip("flatbuffers", reason=REASON)
    raw, model = file.read_bytes(), model_of(file)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(raw, np.uint8)[buffer.offset :][: buffer.size]
            buffer.offset = buffer.size = 0
    wanted = next(d for d in model.signatureDefs if d.signatureKey.decode() == signature)
    model.subgraphs = [model.subgraphs[wanted.subgraphIndex]]
    wanted.subgraphIndex, model.signatureDefs = 0, [wanted]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    assert schema.ModelT.InitFromPackedBuf(bytes(builder.Output()), 0).subgraphs
    return bytes(builder.Output())


def delegated(file: Path, signature: str) -> tuple[list[str], set[int], int]:
    """What LiteRT really does with a graph: its operators; the numbers of those that XNNPACK takes;
    in how many pieces.

    The delegate's nodes stand behind the others and make what these made: what no output needs any
    more, going back from them, was taken.
    """
    model = litert().Interpreter(model_content=alone(file, signature), num_threads=1)
    model.allocate_tensors()
    nodes = model._get_ops_details()
    made = {int(i): node for node in nodes for i in node["outputs"]}
    wanted = [int(entry["index"]) for entry in model.get_output_details()]
    left: set[int] = set()
    while wanted:
        node = made.get(wanted.pop())
        if node is not None and node["index"] not in left:
            left.add(node["index"])
            wanted.extend(int(i) for i in node["inputs"] if i >= 0)
    names = [node["op_name"] for node in nodes]
    own = [name for name in names if name != "DELEGATE"]
    assert names == [*own, *["DELEGATE"] * (len(names) - len(own))]
    return own, set(range(len(own))) - left, len(names) - len(own)
