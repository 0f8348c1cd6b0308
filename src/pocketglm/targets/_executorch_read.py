"""Reads a .pte file: its program, XNNPACK's graphs in it, and their constants.

Taken apart by ExecuTorch's own schemas (its program's, and XNNPACK's by its flatc); nothing of how
the file was made takes part. INT4 weights: value + 8, two in a byte, the first one low.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketglm.errors import CheckpointError, require
from pocketglm.runtimes._quiet import quiet
from pocketglm.targets._executorch_lower import METHOD

NOWHERE = 0xFFFFFFFF  # the id of what is not there
_HEADER = struct.Struct("<10xIIQQ")  # of a delegate: magic, graph's offset and size, constants'
_KINDS = {"BYTE": torch.uint8, "CHAR": torch.int8, "INT": torch.int32, "LONG": torch.int64}
_KINDS |= {"HALF": torch.float16, "FLOAT": torch.float32, "DOUBLE": torch.float64}
_KINDS |= {"BOOL": torch.bool}


class PteFile:
    """A file's method `forward`."""

    def __init__(self, file: Path) -> None:
        with quiet():
            place = "executorch.exir._serialize._program"
            read = require(place, extra="executorch").deserialize_pte_binary
            try:
                found = read(file.read_bytes())
            except (ValueError, AssertionError, struct.error, IndexError) as error:
                raise CheckpointError(
                    f"{file} is no ExecuTorch program: {error}",
                    "copy the folder again, or export the checkpoint again",
                ) from error
        self.program, self._named = found.program, found.named_data
        self.plan = next(p for p in self.program.execution_plan if p.name == METHOD)

    @property
    def instructions(self) -> list[Any]:
        """In the order in which they run."""
        return [i.instr_args for chain in self.plan.chains for i in chain.instructions]

    def operator(self, call: Any) -> str:
        """`aten::add.out`."""
        found = self.plan.operators[call.op_index]
        return f"{found.name}.{found.overload}" if found.overload else found.name

    def constant(self, value: Any) -> Tensor | None:
        """A tensor of the program if it is stored; None: it is computed, or a cache."""
        if not value.data_buffer_idx:
            return None
        raw = self.program.constant_buffer[value.data_buffer_idx].storage
        return _tensor(raw, _KINDS[value.scalar_type.name], value.sizes)

    def kind(self, place: int) -> torch.dtype:
        """The type of a value of the program that is a tensor."""
        return _KINDS[self.plan.values[place].val.scalar_type.name]

    @cache  # noqa: B019  # lives as long as the file is read
    def graph(self, number: int) -> XnnGraph:
        """The graph of delegate `number`."""
        reference = self.plan.delegates[number].processed
        data = bytes(self.program.backend_delegate_data[reference.index].data)
        start, size, *_ = _HEADER.unpack_from(data)
        return XnnGraph(_xnn_json(data[start : start + size]), self._named)


class XnnGraph:
    """One of XNNPACK's graphs: operators and values by number."""

    def __init__(self, found: Any, named: Any) -> None:
        self._named, self._found = named, found
        self.inputs: list[int] = found["input_ids"]
        self.outputs: list[int] = found["output_ids"]
        self.nodes = [(n["xnode_union_type"], n["xnode_union"], n) for n in found["xnodes"]]
        self.values: dict[int, dict[str, Any]] = {}
        for value in found["xvalues"]:
            union = value["xvalue_union"]
            inner = union.get("tensor_value", union)
            quant = union.get("quant_params") if "tensor_value" in union else None
            self.values[inner["id_out"]] = inner | {"quant": quant}
        self.externals = {
            v["id_out"]: v["external_id"]
            for v in self.values.values()
            if v["external_id"] != NOWHERE
        }

    def constant(self, number: int) -> tuple[Tensor, Tensor | None] | None:
        """A stored value and its scales [N, G]: None: it is float; no value: it is computed."""
        value = self.values[number]
        if not value["constant_buffer_idx"]:
            return None
        raw, kind = self._bytes(value["constant_buffer_idx"]), value["datatype"]
        kind, shape = kind.removeprefix("xnn_datatype_"), value["dims"]
        if kind == "fp32":
            return _tensor(raw, torch.float32, shape), None
        form = value["quant"]
        stored = self._bytes(form["scale_buffer_idx"])
        if kind == "qcint8":
            return _tensor(raw, torch.int8, shape), _tensor(stored, torch.float32, (shape[0], 1))
        if kind == "qbint4":
            both = np.frombuffer(raw, np.uint8, math.prod(shape) // 2).reshape(shape[0], -1)
            pairs = np.stack([both & 15, both >> 4], -1).reshape(shape).astype(np.int8) - 8
            groups = shape[1] // form["group_size"]
            scales = _tensor(stored, torch.bfloat16, (shape[0], groups)).float()
            return torch.from_numpy(pairs), scales
        raise CheckpointError(f"a constant of XNNPACK's type {kind} is not known here")

    def _bytes(self, index: int) -> bytes:
        entry = self._named.pte_data[self._found["constant_data"][index]["named_key"]]
        return bytes(self._named.buffers[entry.buffer_index])


def _tensor(raw: bytes, kind: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)  # the stored bytes may be filled up behind
    return torch.frombuffer(bytearray(raw), dtype=kind, count=count).reshape(tuple(shape))


def _xnn_json(data: bytes) -> Any:
    """XNNPACK's graph, from its flatbuffer, by the schema that comes with it."""
    flatc = require("executorch.exir._serialize._flatbuffer", extra="executorch")
    package = "executorch.backends.xnnpack.serialization"
    schema = resources.files(package).joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "schema.fbs").write_bytes(schema)
        (place / "graph.bin").write_bytes(data)
        options = ["--raw-binary"]
        flatc._flatc_decompile(folder, str(place / "schema.fbs"), str(place / "graph.bin"), options)
        text = (place / "graph.json").read_text()
        return json.loads(re.sub(r"(?<=[ -])inf\b", "Infinity", text))  # limits that are none
