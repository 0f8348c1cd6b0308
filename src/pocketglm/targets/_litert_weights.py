"""A checkpoint's weights as the constants of a LiteRT or Core ML file, by our parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Floats
from pocketglm.model import bert, causal
from pocketglm.model.hf import decoder_spec_of, is_decoder, is_embedding, stored_name
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import Quantized, as_tensor, read_grid, read_quantized, read_weight
from pocketglm.targets._onnx_rows import stored_shape


@dataclass(frozen=True, slots=True)
class Weights:
    """results: by layer, the range that its result had on sample texts; of static layers."""

    ckpt: Checkpoint
    results: dict[str, tuple[float, float]] = field(default_factory=dict)

    def floats(self, name: str) -> Floats:
        """The tensor in float32, dequantized if need be."""
        array: Floats = read_weight(self.ckpt, stored_name(self.ckpt, name)).numpy()
        return array

    def shape(self, name: str) -> tuple[int, int]:
        """[N, K] of a weight."""
        return stored_shape(self.ckpt, stored_name(self.ckpt, name))

    def scheme(self, name: str) -> TensorScheme | None:
        """How a weight is quantized; None: it is stored in float."""
        return self.ckpt.manifest.schemes.get(stored_name(self.ckpt, name))

    def scales(self, name: str) -> Floats:
        """Of a quantized weight: float32 [N, G]."""
        stored = f"{stored_name(self.ckpt, name)}_scale"
        array: Floats = as_tensor(self.ckpt.read(stored)).float().numpy()
        return array

    def integers(self, name: str) -> Quantized:
        """Of a quantized weight."""
        return read_quantized(self.ckpt, stored_name(self.ckpt, name))

    def grid(self, name: str) -> InputGrid | None:
        """How the input of the layer with weight `name` is quantized; None: not on a fixed grid."""
        return read_grid(self.ckpt, stored_name(self.ckpt, name))

    def factored(self, layer: str) -> bool:
        """Whether a layer's weight is the product of two."""
        if not layer.startswith("blocks."):
            return False
        inner = stored_name(self.ckpt, f"{layer}.factor_in.weight")
        return inner in self.ckpt.tensors or f"{inner}_packed" in self.ckpt.tensors

    def label(self, name: str) -> str:
        """The constant's name in the file: Hugging Face's, without a prefix."""
        return causal.hf_name(name) if is_decoder(self.ckpt) else bert.hf_name(name)

    def blocked(self, name: str) -> bool:
        """Whether a quantized weight has its scales by block in the file: INT4 that is multiplied
        with quantized inputs, and every group.
        """
        scheme = self.scheme(name)
        if scheme is None or scheme.bits == 8:
            return False
        if not is_embedding(stored_name(self.ckpt, name)):
            return scheme.group_size is not None or scheme.activation != "none"
        return scheme.group_size is not None or (self.tied and self.dynamic)

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding."""
        return is_decoder(self.ckpt) and decoder_spec_of(self.ckpt).tied

    @property
    def dynamic(self) -> bool:
        """Whether inputs may be quantized, of any linear layer but a tied head."""
        return any(scheme.activation != "none" for scheme in self.linear_schemes)

    @property
    def linear_schemes(self) -> Sequence[TensorScheme]:
        """Of all weights but embeddings."""
        schemes = self.ckpt.manifest.schemes.items()
        return [scheme for name, scheme in schemes if not is_embedding(name)]
