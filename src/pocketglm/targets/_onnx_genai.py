"""genai_config.json: what onnxruntime-genai must know of a decoder file.

The type is "decoder" for every family: onnxruntime-genai 0.18 does not know GLM's, and treats the
others alike. Without a thread count it takes half the cores. Keys that it does not know, in
session_options, go to ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

from pocketglm.model.spec import DecoderSpec


def genai_config(
    spec: DecoderSpec,
    eos_ids: tuple[int, ...],
    *,
    model_file: str,
    context: int,
    threads: int,
    spinning: bool,
) -> dict[str, Any]:
    """The file's content; generation is greedy unless the app asks for sampling."""
    pad = spec.pad_id if spec.pad_id is not None else next(iter(eos_ids), 0)
    decoder = {
        "session_options": {
            "intra_op_num_threads": threads,
            "inter_op_num_threads": 1,
            "session.intra_op.allow_spinning": "1" if spinning else "0",
            "provider_options": [],
        },
        "filename": model_file,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            **({} if spec.bos_id is None else {"bos_token_id": spec.bos_id}),
            # It opens no file whose config has an id beyond the vocabulary, such as a default's.
            "eos_token_id": [token for token in eos_ids if token < spec.vocab_size],
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": spec.vocab_size,
            "type": "decoder",
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_length": 0,
            "max_length": context,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
