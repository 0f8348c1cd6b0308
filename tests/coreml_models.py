"""Tiny Core ML packages as the converter writes them, right ones and the known wrong ones."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

V, D, SLOTS, STATES = 40, 16, 12, ("keys", "values")


class TinyDecoder(nn.Module):
    """One layer, one head. write: how the cache is written. masked: by `torch.where`."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, write: str = "slice", *, masked: bool = False, every: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.masked, self.every = write, masked, every
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        for name in STATES:
            self.register_buffer(name, torch.zeros(1, SLOTS, D))

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """ids [1, S], position of the first [1] -> logits [1, 1, V], of the last, or of all."""
        count, first = ids.shape[1], position[0]
        places = position + torch.arange(count)
        x = self.tokens(ids)
        for cache, new in ((self.keys, self.k(x)), (self.values, self.v(x))):
            if self.write == "slice":
                cache[:, first : first + count] = new
            else:  # index_put, which the converter drops for one token
                cache[:, places] = new
        seen = torch.arange(SLOTS)[None] <= places[:, None]
        bias = torch.where(seen, 0.0, -1e4) if self.masked else (seen.float() - 1) * 1e4
        scores = self.q(x) @ self.keys.transpose(-1, -2) / D**0.5 + bias
        x = x + scores.softmax(-1) @ self.values
        logits: torch.Tensor = self.head(x if self.every else x[:, -1:])
        return logits


class TinyEncoder(nn.Module):
    """Means of the rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(V, D)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask [1, S] -> [1, D]."""
        keep = mask[..., None].float()
        means: torch.Tensor = (self.tokens(ids) * keep).sum(1) / keep.sum(1)
        return means


def convert_encoder(path: Path, sizes: Sequence[int] | None = None) -> Path:
    """The encoder for texts of some sizes, or (None) of 2 to 7 tokens."""
    import coremltools as ct

    example = tuple(torch.ones(1, 5, dtype=torch.int32) for _ in range(2))
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        trace: Any = torch.jit.trace
        shapes = [(1, size) for size in sizes or ()]
        shape = ct.EnumeratedShapes(shapes) if shapes else (1, ct.RangeDim(2, 7, default=5))
        converted = ct.convert(
            trace(TinyEncoder().eval(), example),
            inputs=[
                ct.TensorType(name, shape, dtype=np.int32)
                for name in ("input_ids", "attention_mask")
            ],
            outputs=[ct.TensorType("sentence_embedding", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    converted.save(str(path))
    return path


def torch_logits(ids: Sequence[int]) -> Any:
    """Float32 [S, V] of a text, without a cache."""
    with torch.no_grad():
        model = TinyDecoder(every=True)
        return model(torch.tensor([list(ids)]), torch.tensor([0]))[0].numpy()


def convert(
    model: nn.Module,
    path: Path,
    count: int = 1,
    *,
    states: bool = True,
    ids_type: Any = np.int32,
    flexible: bool = False,
    half: bool = True,
) -> Path:
    """A decoder traced with `count` tokens, converted and saved as `path`."""
    import coremltools as ct

    example = (torch.zeros(1, count, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        trace: Any = torch.jit.trace
        traced = trace(model.eval(), example, check_trace=False)
        size = ct.RangeDim(1, SLOTS, default=count) if flexible else count
        kind = {} if ids_type is None else {"dtype": ids_type}
        state = [
            ct.StateType(ct.TensorType(shape=(1, SLOTS, D), dtype=np.float16), name=name)
            for name in STATES
        ]
        converted = ct.convert(
            traced,
            inputs=[
                ct.TensorType("input_ids", (1, size), **kind),
                ct.TensorType("position", (1,), dtype=np.int32),
            ],
            outputs=[ct.TensorType("logits", dtype=np.float32)],
            states=state if states else None,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    converted.save(str(path))
    return path


def two_functions(path: Path, prompt: int, *, every: bool = False) -> Path:
    """`prefill` of `prompt` tokens and `decode` of one, in one package."""
    import coremltools as ct

    functions = ct.utils.MultiFunctionDescriptor()
    for name, count in (("prefill", prompt), ("decode", 1)):
        part = convert(TinyDecoder(every=every), path.with_name(f"{name}.mlpackage"), count)
        functions.add_function(str(part), "main", name)
    functions.default_function_name = "decode"
    with contextlib.redirect_stderr(io.StringIO()):
        ct.utils.save_multifunction(functions, str(path))
    return path


def build(path: Path, function: Any, inputs: dict[str, Any], opset: int = 18, **extra: Any) -> Path:
    """A package of one function that the MIL builder makes.

    inputs: name -> (shape, MIL type name). function: builder, inputs by name -> results.
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    version = getattr(ct.target, f"iOS{opset}")
    ports = {
        name: Builder.placeholder(shape, getattr(types, kind))
        for name, (shape, kind) in inputs.items()
    }
    with Function(ports, opset_version=version) as made:
        made.set_outputs(function(Builder, types, **made.inputs))
    program = Program()
    program.add_function("main", made)
    with contextlib.redirect_stderr(io.StringIO()):
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=version,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(path))
    return path
