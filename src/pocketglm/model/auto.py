"""Registers `model_type: pocketglm` with transformers; import it before `from_pretrained`.

    import pocketglm.model.auto
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

The models wrap our `Encoder` or `Decoder` and load through our reader, so quantized folders open
too (dequantized; inputs with a fixed grid are rounded to it). Only on demand: nothing else in the
package imports transformers' model classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    SequenceClassifierOutput,
)

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_decoder, load_encoder, save_decoder, save_encoder
from pocketglm.model.inputs import cache_scales, input_grids
from pocketglm.ops.fake_quant import InputGrid, quantized_inputs


class PocketGLMConfig(BertConfig):  # type: ignore[no-untyped-call]
    """BERT's fields, and `pooling` says how tokens are pooled; a decoder has its family's.

    Pruned layers: `head_dim`, `layer_num_attention_heads`, `layer_intermediate_size`; factorized
    ones: `layer_ranks`; a decoder's structure: `layer_blocks`, `unified_blocks`, `attention_top_k`.
    """

    model_type = "pocketglm"
    pooling: str = "mean"


class PocketGLMModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The encoder without its head: hidden states, and their pooled vector."""

    config_class = PocketGLMConfig
    base_model_prefix = "encoder"

    def __init__(
        self,
        config: PocketGLMConfig,
        encoder: Encoder,
        manifest: Manifest,
        grids: Mapping[str, InputGrid] = MappingProxyType({}),
    ) -> None:
        super().__init__(config)
        self.encoder = encoder
        self.manifest = manifest
        self.grids = grids  # inputs of the encoder's layers are rounded to these

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *_: Any, config: PocketGLMConfig | None = None, **kwargs: Any
    ) -> PocketGLMModel:
        """Open a folder (never a hub id). Of the keyword arguments, `config` and `dtype` count."""
        ckpt = Checkpoint.open(path)
        config = config or PocketGLMConfig.from_pretrained(path)
        encoder = load_encoder(ckpt)
        model = cls(config, encoder, ckpt.manifest, input_grids(ckpt, encoder))
        _settle(model, kwargs)
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *_: Any, **__: Any
    ) -> None:
        """Write the whole encoder, head included, as `save_encoder` does; without a tokenizer."""
        names: Any = self.config.id2label
        labels = [names[index] for index in range(self.encoder.spec.num_labels)]
        save_encoder(
            self.encoder, Path(save_directory), source=None, labels=labels, manifest=self.manifest
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """input_ids [B, S] right-padded -> last_hidden_state [B, S, H], pooler_output [B, H]."""
        mask = _mask(input_ids, attention_mask, token_type_ids)
        with quantized_inputs(self.encoder, self.grids):
            hidden = self.encoder.hidden(input_ids, mask)
            pooled = self.encoder.pool(hidden, mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class PocketGLMForSequenceClassification(PocketGLMModel):  # type: ignore[no-untyped-call]
    """The encoder with its classifier; `labels` int64 [B] gives a cross-entropy loss."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """input_ids [B, S] right-padded -> logits float32 [B, C]."""
        with quantized_inputs(self.encoder, self.grids):
            logits = self.encoder(input_ids, _mask(input_ids, attention_mask, token_type_ids))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class PocketGLMForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A decoder; it scores whole texts. To write new ones, use `pocketglm run`."""

    config_class = PocketGLMConfig
    base_model_prefix = "decoder"

    def __init__(self, config: PocketGLMConfig, decoder: Decoder, manifest: Manifest) -> None:
        super().__init__(config)
        self.decoder = decoder
        self.manifest = manifest

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *_: Any, config: PocketGLMConfig | None = None, **kwargs: Any
    ) -> PocketGLMForCausalLM:
        """As `PocketGLMModel.from_pretrained`."""
        ckpt = Checkpoint.open(path)
        config = config or PocketGLMConfig.from_pretrained(path)
        decoder = load_decoder(ckpt)
        decoder.cache_scales = cache_scales(ckpt)
        model = cls(config, decoder, ckpt.manifest)
        _settle(model, kwargs)
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *_: Any, **__: Any
    ) -> None:
        """Write it as a float model of its family, as `save_decoder` does; without a tokenizer."""
        save_decoder(self.decoder, Path(save_directory), source=None, manifest=self.manifest)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """input_ids [B, S] right-padded -> logits float32 [B, S, V].

        labels: int64 [B, S], those of `input_ids` (-100: does not count), give the mean loss of
        each next token.
        """
        logits = self.decoder(input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def _settle(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """The type that was asked for, and eval mode."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, torch.dtype):
        model.to(dtype)  # type: ignore[arg-type]
    model.train(False)


def _mask(ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
    if types is not None and bool(types.any()):
        raise ValueError("pairs of texts (token type 1) are not supported: pass single texts")
    return torch.ones_like(ids) if mask is None else mask


AutoConfig.register(PocketGLMConfig.model_type, PocketGLMConfig)
AutoModel.register(PocketGLMConfig, PocketGLMModel)
AutoModelForCausalLM.register(PocketGLMConfig, PocketGLMForCausalLM)
AutoModelForSequenceClassification.register(PocketGLMConfig, PocketGLMForSequenceClassification)
