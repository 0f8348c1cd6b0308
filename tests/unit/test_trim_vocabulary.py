"""The method trim_vocabulary: rows, ids and tokenizer move together; the rest stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chat_decoder import edit
from tiny_decoder import save_tiny_decoder
from tiny_encoder import quantize_weights, save_tiny
from tokenizers import Tokenizer as Inner
from tokenizers import models

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST, CommandGrammar, Manifest, Step, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions
from pocketglm.data.commands import generate
from pocketglm.data.tokenizer_training import (
    save_chat_tokenizer,
    save_tokenizer,
    train_bpe,
    train_wordpiece,
)
from pocketglm.errors import CheckpointError, PlanError, UnsupportedError
from pocketglm.model.hf import load_decoder, load_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan
from pocketglm.text.frame import FrameTokens, mark_names
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import read_task

ROWS = [(row.text, row.intent) for row in generate("train", "both", n=400)]
SIZE = 600  # tokens of the decoders' tokenizer; their embedding has some rows more
GRAMMAR = CommandGrammar(intents={"alarm": ["time"], "play": []})


def write_rows(folder: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows), ("validation", held_out)):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in part)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    rows = [{"text": text, "label": f"label {n % 3}"} for n, (text, _) in enumerate(ROWS)]
    return DataOptions(write_rows(tmp_path_factory.mktemp("data"), rows[:60], rows[60:120]))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose tokenizer knows all texts."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    tokenizer = train_wordpiece([text for text, _ in ROWS], 900)
    save_tiny(folder, vocab_size=tokenizer.get_vocab_size(), pooling="cls", pooler=True)
    save_tokenizer(tokenizer, folder, 48)
    return folder


def save_decoder_with_words(folder: Path, name: str, marks: list[str] = [], **over: Any) -> Path:  # noqa: B006
    fields = {"eos_token_id": [1, 5], "bos_token_id": 3, "pad_token_id": 0} | over
    save_tiny_decoder(folder, name, vocab_size=SIZE + 40, head_dim=32, **fields)
    tokenizer = train_bpe([text for text, _ in ROWS], SIZE)
    tokenizer.add_special_tokens(marks)
    save_chat_tokenizer(tokenizer, folder, 64)
    return folder


def trimmed(source: Path, out: Path, data: DataOptions, **settings: Any) -> tuple[Checkpoint, Step]:
    result = compress(source, Plan.single("trim_vocabulary", settings), out, data=data, task=None)
    ckpt = Checkpoint.open(out)
    assert result.bytes_after == sum(info.nbytes for info in ckpt.tensors.values())
    return ckpt, ckpt.manifest.lineage[-1]


def kept_ids(before: Path, after: Path) -> list[int]:
    """Old id of each new one, by the tokens' names."""
    old, new = Tokenizer.load(before), Tokenizer.load(after)
    names = new.inner.get_vocab()
    assert sorted(names.values()) == list(range(new.size))
    return [old.inner.get_vocab()[name] for name in sorted(names, key=names.__getitem__)]


# --- encoders ------------------------------------------------------------------------------------


def test_an_encoder_says_the_same(encoder: Path, data: DataOptions, tmp_path: Path) -> None:
    ckpt, step = trimmed(encoder, tmp_path / "out", data)
    assert ckpt.config["vocab_size"] == step.effect["vocabulary"] < step.effect["vocabulary_before"]
    assert ckpt.config["vocab_size"] % 32 == 0
    assert step.effect["corpus_changed"] == step.effect["corpus_lost"] == 0
    assert step.effect["held_out_unknown"] == 0
    assert step.effect["held_out_longer"] > 0
    assert 0 < step.effect["held_out_changed"] < 1
    assert step.effect["held_out_texts"] == 60
    old, new = load_encoder(Checkpoint.open(encoder)), load_encoder(ckpt)
    moved = 0
    for text, _ in ROWS[:20]:
        rows = [Tokenizer.load(folder).encode([text], 48) for folder in (encoder, tmp_path / "out")]
        moved += not np.array_equal(rows[0].ids, rows[1].ids)
        logits = [
            model(torch.from_numpy(row.ids), torch.from_numpy(row.mask))
            for model, row in zip((old, new), rows, strict=True)
        ]
        assert torch.equal(logits[0], logits[1])
    assert moved > 5
    text = ROWS[0][0]
    auto: Any = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "out").eval()
    assert type(theirs) is transformers.BertForSequenceClassification
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text, return_tensors="pt")
    ours = new(inputs["input_ids"], inputs["attention_mask"])
    assert torch.allclose(theirs(**inputs).logits, ours, atol=1e-5)


def test_further_corpora(encoder: Path, data: DataOptions, tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("\n".join(text for text, _ in ROWS[60:90]), encoding="utf-8")
    (plain, _), (ckpt, step) = (
        trimmed(encoder, tmp_path / name, data, corpora=corpora)
        for name, corpora in (("plain", []), ("more", [str(more)]))
    )
    assert len(plain.read("bert.embeddings.word_embeddings.weight")) < ckpt.config["vocab_size"]
    assert step.effect["corpus_texts"] > 80
    more.write_text("play music", encoding="utf-8")  # what the file holds decides, not its name
    _, step = trimmed(encoder, tmp_path / "again", data, corpora=[str(more)])
    assert step.effect["corpus_texts"] <= 61


def test_everything_else_is_copied(encoder: Path, data: DataOptions, tmp_path: Path) -> None:
    """Shards, a pretraining head, half precision, side files, ids in the configs."""
    source = tmp_path / "source"
    source.mkdir()
    ckpt = Checkpoint.open(encoder)
    rows = ckpt.config["vocab_size"]
    arrays = {name: ckpt.read(name).astype(np.float16) for name in ckpt.tensors}
    arrays["cls.predictions.bias"] = np.arange(rows, dtype=np.float16)
    names = sorted(arrays)
    where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in set(where.values()):
        safetensors.write_file(source / shard, [(n, arrays[n]) for n in names if where[n] == shard])
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST):
        (source / name).write_bytes((encoder / name).read_bytes())
    edit(source / "config.json", pad_token_id=0, sep_token_id=3, something="else")
    edit(source / "generation_config.json", mask_token_id=4, eos_token_id=rows - 1)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')

    after, _ = trimmed(source, tmp_path / "out", data)
    kept = kept_ids(source, tmp_path / "out")
    assert rows - 1 in kept  # the config names it
    assert {info.dtype for info in after.tensors.values()} == {"F16"}
    assert not list((tmp_path / "out").glob("*index.json"))
    for name, array in arrays.items():
        by_token = "word_embeddings" in name or "predictions" in name
        assert np.array_equal(after.read(name), array[kept] if by_token else array), name
    assert after.config["something"] == "else"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == kept.index(rows - 1)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_twice_in_a_plan_and_before_quantization(
    encoder: Path, data: DataOptions, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "steps:\n- trim_vocabulary: {extra: 200}\n- trim_vocabulary: {}\n"
        "- quantize_rtn: {embeddings: 8}\n"
    )
    compress(encoder, Plan.from_file(plan), tmp_path / "out", data=data)
    first, second, _ = Checkpoint.open(tmp_path / "out").manifest.lineage
    assert first.effect["vocabulary"] > second.effect["vocabulary"]
    assert second.effect["vocabulary_before"] == first.effect["vocabulary"]


# --- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm-half-bias", "glm-wide", "llama", "qwen2", "qwen3"])
def test_a_decoder_says_the_same(name: str, tmp_path: Path) -> None:
    """Tied and untied heads; the logits of the kept tokens, bit for bit."""
    source = save_decoder_with_words(tmp_path / "source", name)
    texts = [{"text": text} for text, _ in ROWS]
    data = DataOptions(write_rows(tmp_path / "data", texts[:40], texts[40:80]))
    out = tmp_path / "out"
    plan = Plan.single("trim_vocabulary", {"pad_to_multiple": 1})
    compress(source, plan, out, data=data, task="lm")
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    kept = kept_ids(source, out)
    assert 264 < len(kept) == after.config["vocab_size"] < SIZE
    eos = before.config["eos_token_id"]
    assert [kept[token] for token in after.config["eos_token_id"]] == eos
    assert kept[after.config["pad_token_id"]] == before.config["pad_token_id"]
    old, new = load_decoder(before), load_decoder(after)
    tokenizers = Tokenizer.load(source), Tokenizer.load(out)
    for row in texts[:10]:
        ids = [torch.tensor([t.encode_prompt(row["text"])]) for t in tokenizers]
        assert torch.equal(old(ids[0])[..., kept], new(ids[1]))
    text = texts[0]["text"]
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(out).eval()
    assert type(theirs) is type(auto.from_pretrained(source))
    inputs = transformers.AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tokenizers[1].encode_prompt(text)]
    logits = theirs(input_ids=inputs["input_ids"]).logits
    assert torch.allclose(logits, new(inputs["input_ids"]), atol=1e-4)


def test_source_and_target_through_the_chat_template(tmp_path: Path) -> None:
    source = save_decoder_with_words(tmp_path / "source", "glm-wide")
    texts = [text for text, _ in ROWS]
    rows = [{"source": a, "target": b} for a, b in zip(texts[:40], texts[40:80], strict=True)]
    data = DataOptions(write_rows(tmp_path / "data", rows[:30], rows[30:]))
    compress(source, Plan.single("trim_vocabulary"), tmp_path / "out", data=data, task="lm")
    kept = kept_ids(source, tmp_path / "out")
    old, new = Tokenizer.load(source), Tokenizer.load(tmp_path / "out")
    for row in rows[:30]:
        chat = f"[gMASK]<sop><|user|>\n{row['source']}<|assistant|>\n"
        for text in (chat, row["target"]):
            ids = new.encode_prompt(text, special=False)
            assert [kept[token] for token in ids] == old.encode_prompt(text, special=False)


def test_a_model_for_commands_keeps_its_marks(tmp_path: Path) -> None:
    marks = mark_names(GRAMMAR)
    source = save_decoder_with_words(tmp_path / "source", "llama", marks)
    write_json(source / MANIFEST, Manifest(task="command", command=GRAMMAR))
    rows = [
        {"text": f"wake me at {hour}", "slots": {"time": hour}, "intent": "alarm"}
        for hour in ("7", "noon", "half past nine")
    ] + [{"text": "play (loud) 音乐", "slots": {}, "intent": "play"}]
    data = DataOptions(write_rows(tmp_path / "data", rows, rows[:2]))
    compress(source, Plan.single("trim_vocabulary"), tmp_path / "out", data=data)
    after = Checkpoint.open(tmp_path / "out")
    assert after.manifest.command == GRAMMAR
    assert after.manifest.lineage[-1].effect["validation_exact_match"] >= 0
    kept = kept_ids(source, tmp_path / "out")
    old, new = (FrameTokens(GRAMMAR, Tokenizer.load(p)) for p in (source, tmp_path / "out"))
    assert [kept[token] for token in new.marks] == old.marks.tolist()
    for row in read_task("command", data).train:
        for a, b in (
            (old.prompt(row.text), new.prompt(row.text)),
            (
                old.answer(row.text, row.frame, row.spans),
                new.answer(row.text, row.frame, row.spans),
            ),
        ):
            assert [kept[token] for token in b] == a


def test_ids_that_upstream_assumes_are_written_down(tmp_path: Path) -> None:
    source = save_decoder_with_words(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    del config["bos_token_id"], config["eos_token_id"]
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    data = DataOptions(write_rows(tmp_path / "data", [{"text": "hello"}], [{"text": "hello"}]))
    compress(source, Plan.single("trim_vocabulary"), tmp_path / "out", data=data, task="lm")
    after = Checkpoint.open(tmp_path / "out").config
    assert (after["bos_token_id"], after["eos_token_id"]) == (1, 2)


# --- refusals ------------------------------------------------------------------------------------


def test_refusals(encoder: Path, data: DataOptions, tmp_path: Path) -> None:
    def refused(source: Path, match: str, **settings: Any) -> None:
        with pytest.raises((UnsupportedError, CheckpointError), match=match):
            trimmed(source, tmp_path / "out", data, **settings)
        assert not (tmp_path / "out").exists()

    refused(encoder, "corpora: 'none.txt' is no file", corpora=["none.txt"])
    refused(encoder, "max_size 10: special tokens", max_size=10)
    quantized = save_tiny(tmp_path / "quantized")
    quantize_weights(quantized, {"query.weight": TensorScheme(bits=8)})
    refused(quantized, "already quantized: trim the float checkpoint")
    bare = save_tiny(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    refused(bare, "has no tokenizer.json")
    Inner(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(bare / "tokenizer.json"))
    refused(bare, "of kind WordLevel")
    with pytest.raises(PlanError, match="pad_to_multiple = 0"):
        Plan.single("trim_vocabulary", {"pad_to_multiple": 0})
