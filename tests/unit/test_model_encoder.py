"""The encoder against transformers' own BERT, and what `spec` and `encoder` promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.errors import UsageError
from pocketglm.model.encoder import Encoder, init_encoder, with_classifier
from pocketglm.model.hf import load_encoder, spec_of
from pocketglm.model.layers import Attention
from pocketglm.model.spec import BlockSpec, EncoderSpec

TOLERANCE = 1e-4

SMALL = EncoderSpec(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24)
CONFIGS: list[dict[str, Any]] = [
    {},
    {"hidden_act": "gelu_new", "num_hidden_layers": 1, "num_attention_heads": 1},
    {"hidden_act": "relu", "hidden_size": 24, "num_attention_heads": 6, "layer_norm_eps": 1e-3},
    {"max_position_embeddings": 9, "type_vocab_size": 1, "intermediate_size": 7},
]


def reference(kind: str, folder: Path, **over: Any) -> Any:
    """A saved random transformers model in which every parameter matters, biases and norms too."""
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "num_labels": 5,
    }
    torch.manual_seed(1)
    model = getattr(transformers, kind)(transformers.BertConfig(**(sizes | over)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.4)
    model.eval().save_pretrained(folder)
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([9, 4, 1, 7])
    return ids, (torch.arange(9) < lengths[:, None]).long()


def mean_pooled(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = model(ids, attention_mask=mask).last_hidden_state
    rows = [row[keep.bool()].mean(0) for row, keep in zip(hidden, mask, strict=True)]
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("over", CONFIGS)
@torch.inference_mode()
def test_classifier_equals_transformers(tmp_path: Path, over: dict[str, Any]) -> None:
    oracle = reference("BertForSequenceClassification", tmp_path, **over)
    ids, mask = batch()
    ours = load_encoder(Checkpoint.open(tmp_path))(ids, mask)
    expected = oracle(ids, attention_mask=mask).logits
    assert ours.dtype == torch.float32
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("over", CONFIGS)
@torch.inference_mode()
def test_embedding_equals_transformers_with_mean_pooling(
    tmp_path: Path, over: dict[str, Any]
) -> None:
    oracle = reference("BertModel", tmp_path, **over)
    ids, mask = batch()
    ours = load_encoder(Checkpoint.open(tmp_path))(ids, mask)
    assert (ours - mean_pooled(oracle, ids, mask)).abs().max() < TOLERANCE
    assert torch.allclose(ours.norm(dim=-1), torch.ones(4))


@torch.inference_mode()
def test_real_minilm_equals_transformers(minilm: Path) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["wake me at seven", "hi", "how long does it take to boil an egg for the two of us?"]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    oracle: Any = transformers.BertModel.from_pretrained(minilm)
    oracle.eval()
    model = load_encoder(Checkpoint.open(minilm))
    ours = model(rows["input_ids"], rows["attention_mask"])
    expected = mean_pooled(oracle, rows["input_ids"], rows["attention_mask"])
    assert (ours - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.inference_mode()
def test_padding_changes_nothing(pooling: Any) -> None:
    model = with_classifier(init_encoder(SMALL, 3), 4, pooling)
    ids, mask = batch()
    together = model(ids, mask)
    for row, keep, out in zip(ids, mask, together, strict=True):
        length = int(keep.sum())
        alone = model(row[None, :length], keep[None, :length])[0]
        assert (alone - out).abs().max() < 1e-6


@torch.inference_mode()
def test_cls_embedding_is_the_first_token_without_the_pooler(tmp_path: Path) -> None:
    oracle = reference("BertModel", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    ids, mask = batch()
    first = oracle(ids, attention_mask=mask).last_hidden_state[:, 0]
    ours = load_encoder(Checkpoint.open(tmp_path))(ids, mask)
    assert (ours - F.normalize(first, dim=-1)).abs().max() < TOLERANCE


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    oracle = reference("BertForSequenceClassification", tmp_path)
    model = load_encoder(Checkpoint.open(tmp_path))
    ids, mask = batch()
    gold = torch.tensor([0, 1, 2, 3])
    weight = model.blocks[0].get_parameter("attention.value.weight")
    (ours,) = torch.autograd.grad(F.cross_entropy(model(ids, mask), gold), weight)
    logits = oracle(ids, attention_mask=mask).logits
    weight = oracle.bert.encoder.layer[0].attention.self.value.weight
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, gold), weight)
    assert theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < TOLERANCE


def test_dropout_works_in_training_only() -> None:
    ids, mask = batch()
    for field in ("dropout", "attention_dropout", "classifier_dropout"):
        off: dict[str, Any] = dict.fromkeys(
            ("dropout", "attention_dropout", "classifier_dropout"), 0.0
        )
        model = init_encoder(
            EncoderSpec(50, 16, 2, 4, 24, head="classification", num_labels=3, **off | {field: 0.5})
        )
        assert torch.equal(model(ids, mask), model(ids, mask)), field
        model.train()
        assert not torch.equal(model(ids, mask), model(ids, mask)), field


def test_more_tokens_than_positions_is_an_error() -> None:
    model = init_encoder(EncoderSpec(50, 16, 1, 4, 24, max_position_embeddings=8))
    ids, mask = batch()
    with pytest.raises(UsageError, match="9 tokens in a row, the model has 8 positions") as error:
        model(ids, mask)
    assert "--max-length 8" in error.value.hint


def test_init_is_bert_s_and_reproducible() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    spec = EncoderSpec(500, 64, 2, 4, 128, head="classification", num_labels=9)
    model = init_encoder(spec, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    again = init_encoder(spec, seed=5).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(again["classifier.weight"], init_encoder(spec, 6).classifier.weight)  # type: ignore[union-attr]
    for name, value in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not value.any(), name
        elif value.numel() > 4000:
            assert abs(float(value.std()) - 0.02) < 0.001, name


def test_with_classifier_keeps_the_body_and_draws_a_new_head() -> None:
    body = init_encoder(SMALL, 1)
    model = with_classifier(body, 3, seed=4)
    assert model.spec.head == "classification"
    assert (model.spec.pooling, model.spec.num_labels, model.pooler) == ("mean", 3, None)
    for name, value in body.state_dict().items():
        copy = model.state_dict()[name]
        assert torch.equal(copy, value)
        assert copy.data_ptr() != value.data_ptr()
    first, second = (with_classifier(body, 3, seed=s).classifier for s in (4, 5))
    assert model.classifier is not None
    assert first is not None
    assert second is not None
    assert torch.equal(first.weight, model.classifier.weight)
    assert not torch.equal(second.weight, first.weight)
    assert 0.01 < float(first.weight.detach().std()) < 0.03
    assert not first.bias.any()
    relabelled = with_classifier(model, 3, seed=5)
    assert relabelled.classifier is not None
    assert torch.equal(relabelled.classifier.weight, second.weight)
    assert all(p.requires_grad and not p.is_meta for p in relabelled.parameters())


def test_with_classifier_takes_over_the_pooler(tmp_path: Path) -> None:
    oracle = reference("BertModel", tmp_path)
    body = load_encoder(Checkpoint.open(tmp_path))
    with_pooler = with_classifier(body, 2, "cls")
    assert with_pooler.pooler is not None
    assert torch.equal(with_pooler.pooler.weight, oracle.pooler.dense.weight)
    assert with_classifier(body, 2, "mean").pooler is None
    fresh = with_classifier(init_encoder(SMALL), 2, "cls").pooler
    assert fresh is not None
    assert 0.01 < float(fresh.weight.detach().std()) < 0.03


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_heads": 3}, "not a multiple of num_heads 3"),
        ({"head": "classification"}, "cannot have 0 labels"),
        ({"num_labels": 2}, "embedding head cannot have 2 labels"),
        ({"head": "classification", "num_labels": 2, "pooling": "cls"}, "has a pooler exactly if"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(wrong: dict[str, Any], words: str) -> None:
    sizes = {"vocab_size": 5, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=words):
        EncoderSpec(**{**sizes, "intermediate_size": 8, **wrong})


@torch.inference_mode()
def test_grouped_key_value_heads_equal_repeated_ones() -> None:
    torch.manual_seed(0)
    grouped = Attention(block_spec(kv_heads=2))
    plain = Attention(block_spec(kv_heads=4))
    plain.load_state_dict(
        {
            name: value.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
            if name.startswith(("key", "value"))
            else value
            for name, value in grouped.state_dict().items()
        }
    )
    x, attend = torch.randn(2, 5, 16), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert torch.allclose(grouped(x, attend), plain(x, attend), atol=1e-6)


def block_spec(kv_heads: int) -> BlockSpec:
    return BlockSpec(16, 4, kv_heads, 4, 24, "gelu", 1e-12, True, True, 0.0, 0.0)


def test_the_spec_rebuilds_the_loaded_model(minilm: Path) -> None:
    spec = spec_of(Checkpoint.open(minilm))
    with torch.device("meta"):
        model = Encoder(spec)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
