"""BERT as llama.cpp's graph `bert` wants it: metadata, tensors, and what it lacks.

It embeds a text (mean or first token) or classifies it by BERT's pooler and classifier, which
llama.cpp calls ranking: dense, tanh, then a linear layer over the first token. Its GELU is the tanh
approximation, read from a table of half-precision values: `gelu_new` exactly in form, up to 5e-4
beside `gelu`. Read from llama.cpp's src/models/bert.cpp and src/llama-graph.cpp (build_pooling).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._gguf_file import Entry
from pocketglm.targets._gguf_tensors import Source

ARCHITECTURE = "bert"
ACTIVATION = "pocketglm.hidden_act"  # for our own parity; llama.cpp passes over it
POOLING = {"mean": 1, "cls": 2}
RANK = 4
# Tables that llama.cpp reads as float.
FLOAT_TABLES = ("embeddings.positions.weight", "embeddings.types.weight")


def reasons(spec: EncoderSpec) -> list[str]:
    """What of this encoder llama.cpp's graph does not compute."""
    found = []
    if spec.head == "classification" and spec.pooling == "mean":
        found.append(
            "a mean-pooled classifier: llama.cpp classifies by BERT's pooler over the first token; "
            "train with pooling cls, or export an embedding model"
        )
    if spec.layer_heads or spec.layer_ffn:
        found.append("layers of different sizes: bert has one size; prune every layer alike")
    if spec.layer_ranks:
        found.append(
            "factorized layers: bert has one weight for each; export a checkpoint from before that "
            "step"
        )
    width = spec.num_heads * spec.head_dim
    if not spec.layer_heads and width != spec.hidden_size:
        found.append(
            f"{spec.num_heads} heads of {spec.head_dim} are {width} features, bert wants as many "
            f"as the hidden size, {spec.hidden_size}"
        )
    if spec.activation not in ("gelu", "gelu_new"):
        found.append(f"hidden_act {spec.activation}: bert computes gelu")
    return found


def metadata(spec: EncoderSpec, labels: Sequence[str], length: int) -> dict[str, Entry]:
    """The model's numbers, by llama.cpp's keys."""
    pooling = RANK if spec.head == "classification" else POOLING[spec.pooling]
    counts = {
        "vocab_size": spec.vocab_size,
        "context_length": length,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "pooling_type": pooling,
    }
    found = {f"{ARCHITECTURE}.{key}": Entry("u32", value) for key, value in counts.items()}
    found[f"{ARCHITECTURE}.attention.causal"] = Entry("bool", False)
    found[f"{ARCHITECTURE}.attention.layer_norm_epsilon"] = Entry("f32", spec.layer_norm_eps)
    if labels:
        found[f"{ARCHITECTURE}.classifier.output_labels"] = Entry("str[]", list(labels))
    found["tokenizer.ggml.token_type_count"] = Entry("u32", spec.type_vocab_size)
    found[ACTIVATION] = Entry("str", spec.activation)
    return found


def sources(spec: EncoderSpec, length: int) -> Iterator[Source]:
    """The tensors of the file, in order; the position table has `length` rows."""
    yield Source("token_embd.weight", "embeddings.tokens.weight")
    positions, types = FLOAT_TABLES
    yield Source("position_embd.weight", positions, rows=length, exact=True)
    yield Source("token_types.weight", types, exact=True)
    yield from _both("token_embd_norm", "embeddings.norm")
    for index in range(spec.num_layers):
        to, of = f"blk.{index}", f"blocks.{index}"
        for name, layer in (
            ("attn_q", "attention.query"),
            ("attn_k", "attention.key"),
            ("attn_v", "attention.value"),
            ("attn_output", "attention.output"),
            ("attn_output_norm", "attention_norm"),
            ("ffn_up", "ffn.up"),
            ("ffn_down", "ffn.down"),
            ("layer_output_norm", "ffn_norm"),
        ):
            yield from _both(f"{to}.{name}", f"{of}.{layer}")
    if spec.head == "classification":
        yield from _both("cls", "pooler")
        yield from _both("cls.output", "classifier")


def _both(to: str, of: str) -> Iterator[Source]:
    """Weight and bias."""
    yield Source(f"{to}.weight", f"{of}.weight")
    yield Source(f"{to}.bias", f"{of}.bias")
