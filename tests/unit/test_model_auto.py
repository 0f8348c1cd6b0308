"""What transformers sees of a `pocketglm` folder after `import pocketglm.model.auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_decoder import save_tiny_decoder
from tiny_encoder import quantize_weights, save_tiny

import pocketglm.model.auto
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import RunOptions
from pocketglm.model.encoder import Encoder, init_encoder, with_classifier
from pocketglm.model.hf import load_decoder, load_encoder, save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.runtimes.torch import TorchSession
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

STATIC = TensorScheme(bits=8, activation="static")
LABELS = ["play", "stop", "停"]
IDS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def saved(folder: Path) -> Encoder:
    body = init_encoder(EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32), 1)
    model = with_classifier(body, 3, "mean", seed=2)
    save_encoder(model, folder, source=None, labels=LABELS, manifest=Manifest(task="intent"))
    return model


def opened(auto: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, **options)


@torch.inference_mode()
def test_classifier_opens_as_an_auto_model(tmp_path: Path) -> None:
    model = saved(tmp_path)
    theirs = opened("AutoModelForSequenceClassification", tmp_path)
    assert isinstance(theirs, pocketglm.model.auto.PocketGLMForSequenceClassification)
    assert not theirs.training
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert (theirs.config.pooling, theirs.config.hidden_size) == ("mean", 16)
    result = theirs(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 2]))
    assert torch.equal(result.logits, model(IDS, MASK))
    expected = torch.nn.functional.cross_entropy(result.logits, torch.tensor([0, 2]))
    assert torch.equal(result.loss, expected)
    assert torch.equal(theirs(IDS).logits, model(IDS, torch.ones_like(IDS)))


@torch.inference_mode()
def test_body_opens_as_an_auto_model(tmp_path: Path) -> None:
    model = saved(tmp_path)
    result = opened("AutoModel", tmp_path)(IDS, MASK)
    hidden = model.hidden(IDS, MASK)
    assert torch.equal(result.last_hidden_state, hidden)
    assert torch.allclose(result.pooler_output[1], hidden[1, :4].mean(0), atol=1e-6)
    assert opened("AutoModel", tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_saving_from_transformers_keeps_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    opened("AutoModelForSequenceClassification", tmp_path / "a").save_pretrained(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["glm-half-bias", "qwen3", "llama-tied-biased"])
@torch.inference_mode()
def test_decoder_that_upstream_cannot_express_opens(tmp_path: Path, name: str) -> None:
    """Asymmetric INT4 mixed with INT8."""
    source = save_tiny_decoder(tmp_path / "float", name)
    plan = Plan.single("quantize_rtn", {"bits": 4, "symmetric": False, "embeddings": 8})
    compress(source, plan, tmp_path / "int4")
    ckpt = Checkpoint.open(tmp_path / "int4")
    assert ckpt.config["model_type"] == "pocketglm"
    assert ckpt.manifest.schemes
    theirs = opened("AutoModelForCausalLM", ckpt.path)
    assert isinstance(theirs, pocketglm.model.auto.PocketGLMForCausalLM)
    ours = load_decoder(ckpt)(IDS, MASK)
    result = theirs(input_ids=IDS, attention_mask=MASK, labels=IDS)
    assert torch.equal(result.logits, ours)
    logs = ours.log_softmax(2)[:, :-1].gather(2, IDS[:, 1:, None])
    assert result.loss.item() == pytest.approx(-logs.mean().item(), rel=1e-5)
    assert theirs(IDS).loss is None
    theirs.save_pretrained(tmp_path / "saved")
    again: Any = transformers.AutoModelForCausalLM
    plain = again.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.allclose(plain(IDS[:1]).logits, ours[:1], atol=1e-4)


def test_pairs_of_texts_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = opened("AutoModelForSequenceClassification", tmp_path)
    model(IDS, MASK, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(ValueError, match="pairs of texts"):
        model(IDS, MASK, token_type_ids=MASK)


def test_pipeline_answers_with_our_labels(tmp_path: Path, minilm: Path) -> None:
    source = Checkpoint.open(minilm)
    model = with_classifier(load_encoder(source), 3, seed=1)
    save_encoder(model, tmp_path, source=source, labels=LABELS, manifest=Manifest())
    pipeline: Any = transformers.pipeline("text-classification", model=str(tmp_path))
    (answer,) = pipeline("play some music")
    tokenizer = opened("AutoTokenizer", tmp_path)
    rows = tokenizer("play some music", return_tensors="pt")
    with torch.inference_mode():
        logits = model(rows["input_ids"], rows["attention_mask"])[0]
    assert answer["label"] == LABELS[int(logits.argmax())]
    assert answer["score"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)


def test_fixed_grids_are_used(tmp_path: Path) -> None:
    """A mean-pooled classifier with static inputs computes what the torch runtime does."""
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), {".dense.weight": STATIC})
    session = TorchSession(Checkpoint.open(folder), RunOptions())
    assert session.info.activation == "static"
    wanted = session.logits(IDS.numpy(), MASK.numpy())
    with torch.inference_mode():
        theirs = opened("AutoModelForSequenceClassification", folder)(IDS, MASK)
        plain = load_encoder(Checkpoint.open(folder))(IDS, MASK)
        body = opened("AutoModel", folder)(IDS, MASK)
    assert torch.equal(theirs.logits, torch.from_numpy(wanted))
    assert not torch.equal(theirs.logits, plain)
    assert body.last_hidden_state.shape == (2, 6, 128)
