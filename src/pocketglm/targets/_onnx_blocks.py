"""Runs a written encoder file with activation quantization off, and reads the block boundaries.

Only the operators that quantize their input are replaced, each by the float operator over the
same initializers, dequantized; so a wrong integer, scale or connection in the file still shows.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from pocketglm.contracts import Floats, Ids

_HEADS = ("logits", "sentence_embedding")


def float_blocks(file: Path, ids: Ids, mask: Ids) -> list[tuple[str, Floats]]:
    """ids, mask [B, S] -> values after `embeddings` and each `block.I` [B, S, H]; `head` [B, C]."""
    model = onnx.load(str(file))
    named = [output for node in model.graph.node for output in node.output]
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    nodes = [new for node in model.graph.node for new in _in_float(node, rounded)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    ends = [name for name in named if name == "embeddings" or name.startswith("block.")]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The optimizer would make DequantizeLinear + MatMul a product with int8 activations again.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    head = next(output.name for output in model.graph.output if output.name in _HEADS)
    values = session.run([*ends, head], {"input_ids": ids, "attention_mask": mask})
    return list(zip([*ends, "head"], values, strict=True))


def _in_float(node: NodeProto, rounded: Collection[str]) -> list[NodeProto]:
    """The node without rounding; `rounded` are the outputs of QuantizeLinear."""
    if node.op_type == "DynamicQuantizeMatMul":
        x, weight, scales, zeros, *bias = node.input
        out = list(node.output)
        product = [f"{node.name}.product"] if bias else out
        return [
            *_dequantized(node.name, weight, scales, zeros),
            helper.make_node("MatMul", [x, f"{node.name}.weight"], product),
            *([helper.make_node("Add", [*product, *bias], out)] if bias else []),
        ]
    if node.op_type == "MatMulNBits":
        exact = NodeProto()
        exact.CopyFrom(node)
        next(a for a in exact.attribute if a.name == "accuracy_level").i = 1
        return [exact]
    if node.op_type == "QuantizeLinear" or (
        node.op_type == "DequantizeLinear" and node.input[0] in rounded
    ):
        return [helper.make_node("Identity", node.input[:1], list(node.output))]
    return [node]


def _dequantized(name: str, weight: str, scales: str, zeros: str) -> list[NodeProto]:
    inputs = [weight, scales, zeros] if zeros else [weight, scales]
    return [helper.make_node("DequantizeLinear", inputs, [f"{name}.weight"], axis=1)]
