"""A checkpoint's weights as zeros: for graphs that are looked at, not run."""

from __future__ import annotations

import numpy as np
import torch

from pocketglm.contracts import Floats
from pocketglm.model.hf import stored_name
from pocketglm.ops.stored import Quantized
from pocketglm.targets._litert_weights import Weights


class Zeros(Weights):
    """Zeros of the weights' shapes."""

    def floats(self, name: str) -> Floats:
        stored = stored_name(self.ckpt, name)
        quantized = stored in self.ckpt.manifest.schemes
        shape = self.shape(name) if quantized else self.ckpt.tensors[stored].shape
        return np.zeros(tuple(shape), np.float32)

    def integers(self, name: str) -> Quantized:
        scheme = self.ckpt.manifest.schemes[stored_name(self.ckpt, name)]
        rows, columns = self.shape(name)
        groups = columns // scheme.group_size if scheme.group_size else 1
        zeros = None if scheme.symmetric else torch.zeros((rows, groups), dtype=torch.int8)
        q = torch.zeros((rows, columns), dtype=torch.int8)
        return Quantized(q, torch.ones(rows, groups), zeros, scheme, self.grid(name))
