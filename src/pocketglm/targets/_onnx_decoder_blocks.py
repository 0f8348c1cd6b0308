"""Runs a written decoder file part by part, with activation quantization off.

Every part (embeddings, one block, head) is a small model of its own: the nodes between two named
values of the file's graph, over the same external data. So memory is that of one block, whatever
the size of the file, and a wrong integer, scale or connection in the file still shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper

from pocketglm.contracts import Floats, Ids
from pocketglm.targets._onnx_sparse import ROOM

_PAST = "past_key_values."
_PORTS = ("input_ids", "attention_mask")
_ROWS, _POSITIONS = 512, 4096  # of tables, at a time


def decoder_blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """ids, mask [B, S] -> values [B, S, H] of `embeddings` and each `block.I`; `head` [B, V].

    Of a file with an INT8 cache, `cache.I` comes before `block.I`: the integers that it kept of the
    rows' keys and values, [2, B, kv heads, S, head_dim].

    Before the blocks come the tables of which a few ids and positions say little, in ranges:
    `rows.0:512` [rows, H], where the head does not use them all, and `rotary.0:4096` [2, positions,
    dims / 2], cosines and sines.

    Each block gets its input in two calls, so that the cache is used: all tokens of a row but its
    last, then the last one. Rows have two tokens at least, and padding on the right.
    """
    parts = _Parts(file)
    lookup = parts.session(["embeddings"], ["input_ids"])
    (x,) = lookup.run(None, {"input_ids": ids})
    yield "embeddings", x
    for some in _ranges(0 if parts.tied else parts.vocabulary, _ROWS):
        (found,) = lookup.run(None, {"input_ids": np.arange(some.start, some.stop)[None]})
        yield f"rows.{some.start}:{some.stop}", found[0]
    del lookup
    for names in parts.rotary:
        for some in _ranges(parts.constants[names[0]].dims[0], _POSITIONS):
            yield (
                f"rotary.{some.start}:{some.stop}",
                np.stack([parts.rows(name, some) for name in names]),
            )
    rows, last = np.arange(len(ids)), mask.sum(axis=1) - 1
    prompt = mask.copy()
    prompt[rows, last] = 0
    name = "embeddings"
    for index in range(parts.blocks):
        before, name = name, f"block.{index}"
        x, kept = parts.block(name, before, x, prompt, mask, last)
        if parts.int8:
            yield f"cache.{index}", kept
        yield name, x
    # Two tokens a row: a file that has the logits of the last one only must choose the right one.
    ends = np.stack([x[:, 0], x[rows, last]], axis=1)
    (logits,) = parts.run("logits", {name: ends})
    yield "head", logits[:, -1]


def _ranges(count: int, step: int) -> Iterator[range]:
    for start in range(0, count, step):
        yield range(start, min(start + step, count))


class _Parts:
    """The graph of one file; its weights stay on the disk."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.model = onnx.load(str(file), load_external_data=False)
        graph = self.model.graph
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.past = {i.name: i for i in graph.input if i.name.startswith(_PAST)}
        self.blocks = len(self.past) // 2
        kinds = {port.type.tensor_type.elem_type for port in self.past.values()}
        self.int8 = kinds == {TensorProto.INT8}
        attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        turning = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
        tables = [tuple(node.input[7:9]) for node in attention]
        self.rotary = sorted({*tables, *(tuple(node.input[2:4]) for node in turning)})
        words, head = (self._table(name) for name in ("embeddings", "logits"))
        self.tied = words == head
        self.vocabulary = self.constants[words].dims[0]

    def _table(self, value: str) -> str:
        """The initializer that the node of `value` reads its weight from."""
        node = self.makers[value]
        name = next(i for i in node.input if self._source(i) in self.constants)
        return self._source(name)

    def _source(self, name: str) -> str:
        node = self.makers.get(name)
        return node.input[0] if node is not None and node.op_type == "Reshape" else name

    def rows(self, name: str, some: range) -> Floats:
        """Rows of a float32 initializer, read from the data file."""
        tensor = self.constants[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        width = int(np.prod(tensor.dims[1:]))
        start = int(place["offset"]) + 4 * width * some.start
        with (self.folder / place["location"]).open("rb") as file:
            file.seek(start)
            data = np.frombuffer(file.read(4 * width * len(some)), "<f4")
        return data.reshape(len(some), *tensor.dims[1:])

    def block(
        self, name: str, before: str, x: Floats, prompt: Ids, mask: Ids, last: npt.NDArray[Any]
    ) -> tuple[Floats, Floats]:
        """One block's output [B, S, H] for its input x [B, S, H], prompt and last token apart; and
        its cache [2, B, kv heads, S, head_dim].
        """
        index = name.removeprefix("block.")
        past = [f"{_PAST}{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        session = self.session([name, *present], [before, *_PORTS, *past])
        known = {port.name for port in session.get_inputs()}
        # The columns that hold a prompt; the last token's slot may lie behind them.
        width = int(prompt.sum(axis=1).max())
        dims = self.past[past[0]].type.tensor_type.shape.dim
        slots = width + 1 if dims[2].dim_param == ROOM else 0
        shape = len(x), dims[1].dim_value, slots, dims[3].dim_value
        nothing = np.zeros(shape, np.int8 if self.int8 else np.float32)
        places = np.zeros((len(x), width), np.int64)  # only how many tokens there are counts
        feed = {before: x[:, :width], "attention_mask": prompt[:, :width], "input_ids": places}
        feed = {key: value for key, value in feed.items() if key in known}
        y, *cache = session.run(None, feed | dict.fromkeys(past, nothing))
        rows = np.arange(len(x))
        feed = {before: x[rows, last][:, None], "attention_mask": mask[:, : width + 1]}
        feed |= {"input_ids": places[:, :1]} if "input_ids" in known else {}
        step, *cache = session.run(None, feed | dict(zip(past, cache, strict=True)))
        out = np.zeros_like(x)
        out[:, :width] = y
        out[rows, last] = step[:, 0]
        return out, np.stack(cache).astype(np.float32)

    def run(self, output: str, feed: dict[str, npt.NDArray[Any]]) -> list[Floats]:
        """The value `output` for given values of the graph."""
        found: list[Floats] = self.session([output], list(feed)).run(None, feed)
        return found

    def session(self, outputs: list[str], inputs: list[str]) -> ort.InferenceSession:
        """A session of the nodes from `inputs` to `outputs` alone."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1  # the caller computes on the other cores meanwhile
        options.enable_cpu_mem_arena = False  # the memory goes back with the session
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )
        data = self._extract(outputs, inputs).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def _extract(self, outputs: list[str], inputs: list[str]) -> ModelProto:
        wanted, seen = list(outputs), set(inputs)
        nodes: dict[int, NodeProto] = {}
        constants: dict[str, TensorProto] = {}
        while wanted:
            name = wanted.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if name in self.constants:
                constants[name] = self.constants[name]
                continue
            node = self.makers[name]
            nodes[id(node)] = node
            wanted.extend(node.input)
        used = {name for node in nodes.values() for name in node.input}
        graph = helper.make_graph(
            [_in_float(node) for node in self.model.graph.node if id(node) in nodes],
            "part",
            [self._port(name) for name in inputs if name in used],
            [self._port(name) for name in outputs],
            list(constants.values()),
        )
        return helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def _port(self, name: str) -> onnx.ValueInfoProto:
        kind = TensorProto.FLOAT
        if name in _PORTS:
            kind = TensorProto.INT64
        elif self.int8 and name.startswith((_PAST, "present.")):
            kind = TensorProto.INT8
        return helper.make_tensor_value_info(name, kind, None)


def _in_float(node: NodeProto) -> NodeProto:
    """The node itself, or MatMulNBits with float activations."""
    if node.op_type != "MatMulNBits":
        return node
    exact = NodeProto()
    exact.CopyFrom(node)
    next(a for a in exact.attribute if a.name == "accuracy_level").i = 1
    return exact
