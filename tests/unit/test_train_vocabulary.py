"""New tokens of a decoder: their rows, training them alone, and the model and tokenizer on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.data.frames import grammar_of, read_frames
from pocketglm.data.tokenizer_training import CHAT_SPECIAL, byte_tokenizer, save_chat_tokenizer
from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.hf import load_decoder, save_decoder
from pocketglm.model.spec import DecoderSpec, RopeSpec
from pocketglm.text.frame import FrameTokens, mark_names
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._vocabulary import learn_rows, settle_rows, with_rows
from pocketglm.train.finetune import FinetuneConfig, finetune

SPEC = DecoderSpec(
    family="qwen2",
    vocab_size=264,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    rope=RopeSpec(16),
    max_position_embeddings=96,
    tied=True,
    attention_bias=True,
    eos_ids=(1,),
    pad_id=0,
)
IDS = torch.arange(40).reshape(2, 20) * 6
ROWS = [
    {"text": "play a song", "slots": {"what": "a song"}, "intent": "play"},
    {"text": "wake me at 7", "slots": {"time": "7"}, "intent": "wake"},
    {"text": "stop", "slots": {}, "intent": "stop"},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(tied: bool = True, **changes: Any) -> Decoder:
    return init_decoder(replace(SPEC, tied=tied, **changes), seed=1, std=0.2)


def copies(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tables(model: Decoder) -> list[str]:
    return ["tokens.weight"] if model.head is None else ["tokens.weight", "head.weight"]


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("size", "rows"), [(265, 320), (320, 320), (321, 384), (264, 264), (262, 264)]
)
def test_old_rows_stay_and_new_ones_are_near_them(tied: bool, size: int, rows: int) -> None:
    model = decoder(tied)
    old, before = copies(model), model(IDS % 260)
    grown = with_rows(model, 260, size, seed=3)
    assert grown.spec == replace(model.spec, vocab_size=rows)
    assert grown.state_dict().keys() == old.keys()
    assert not any(tensor.is_meta for tensor in grown.state_dict().values())
    assert not grown.training
    for name, tensor in grown.state_dict().items():
        if name in tables(model):
            assert tensor.shape == (rows, 32)
            assert torch.equal(tensor[:260], old[name][:260])
            assert torch.equal(tensor[size:264], old[name][size:])  # those that no token has
            new = tensor[260 : max(size, rows if size > 264 else 0)]
            assert not torch.equal(tensor[260:262], old[name][260:262])
            assert len(new.unique(dim=0)) == len(new)
            assert new.std().item() == pytest.approx(old[name].std().item(), rel=0.3)
        else:
            assert torch.equal(tensor, old[name])
    assert torch.equal(grown(IDS % 260)[..., :260], before[..., :260])
    assert torch.equal(model.tokens.weight, old["tokens.weight"])  # the old model is as it was


def test_new_rows_begin_at_the_mean() -> None:
    """Hewitt 2021; the noise has the table's own spread."""
    model = decoder(vocab_size=64)
    with torch.no_grad():
        model.tokens.weight += torch.linspace(-3, 3, 32)
    table = model.tokens.weight.detach().double()
    new = with_rows(model, 64, 4096, seed=0).tokens.weight[64:].detach().double()
    spread = table.std()
    assert (new.mean(0) - table.mean(0)).abs().max() < 5 * spread / 4032**0.5
    assert (new - table.mean(0)).std().item() == pytest.approx(spread.item(), rel=0.01)


def test_new_rows_depend_on_the_seed_alone() -> None:
    first, again, other = (
        with_rows(decoder(), 264, 300, seed=seed).tokens.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[264:], other[264:])


def test_types_and_mode_stay() -> None:
    model = decoder(tied=False).bfloat16().train()
    grown = with_rows(model, 264, 300, seed=0)
    assert {tensor.dtype for tensor in grown.state_dict().values()} == {torch.bfloat16}
    assert grown.training


# --- learning some rows alone --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_rows_learn(tied: bool, dtype: torch.dtype) -> None:
    model, ids = decoder(tied).to(dtype), [12, 198, 6]
    model.requires_grad_(False)
    old, names, before = copies(model), list(model.state_dict()), model(IDS)
    learn_rows(model, ids)
    assert torch.equal(model(IDS), before)
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in learned.values()] == [(3, 32)] * len(tables(model))
    assert {p.dtype for p in learned.values()} == {torch.float32}
    loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    torch.autograd.backward(loss)
    optimizer = torch.optim.SGD(learned.values(), lr=10.0)
    optimizer.step()
    during = model(IDS)
    settle_rows(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(model(IDS), during)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        changed = (tensor != old[name]).nonzero()[:, 0].unique().tolist()
        assert changed == (sorted(ids) if name in tables(model) else [])
    settle_rows(model)  # there is nothing left to settle
    assert torch.equal(model(IDS), during)


def test_the_gradient_is_that_of_the_whole_table() -> None:
    """Input and output side together, for tied tables."""
    whole, some, ids = decoder(), decoder(), [12, 0, 6]
    some.requires_grad_(False)
    learn_rows(some, ids)
    for model in (whole, some):
        loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        torch.autograd.backward(loss)
    (rows,) = [p.grad for p in some.parameters() if p.requires_grad]
    assert rows is not None
    assert whole.tokens.weight.grad is not None
    assert torch.allclose(rows, whole.tokens.weight.grad[sorted(ids)], atol=1e-6)
    assert rows.abs().max() > 1e-4


# --- a training run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), ROWS)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_model(folder: Path, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    save_decoder(decoder(tied), folder, source=None, manifest=Manifest(), dtype=dtype)
    save_chat_tokenizer(byte_tokenizer(), folder, 96)
    return folder


def train(source: Path, data: Path, out: Path, **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "task": "command", "data": data, "epochs": 2, "batch_size": 2, "learning_rate": 0.01,
        "precision": "fp32",
    }  # fmt: skip
    finetune(source, FinetuneConfig(**(values | changes)), out)
    return Checkpoint.open(out)


def weights(ckpt: Checkpoint) -> dict[str, Tensor]:
    return load_decoder(ckpt).state_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_marks_alone_change(
    data: Path, tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    source = save_model(tmp_path / "source", tied, dtype)
    ckpt = train(source, data, tmp_path / "out", lora=2)
    old, new = weights(Checkpoint.open(source)), weights(ckpt)
    assert Checkpoint.open(source).tensors.keys() == ckpt.tensors.keys()
    assert len({info.dtype for info in ckpt.tensors.values()}) == 1
    whole = load_decoder(Checkpoint.open(source))
    begun = with_rows(whole, 264, 264 + 7, seed=0).state_dict()  # before the first step
    marks = FrameTokens(grammar_of(read_frames_of(data)), Tokenizer.load(tmp_path / "out")).marks
    assert marks.tolist() == list(range(264, 264 + 7))
    for name, tensor in new.items():
        if name in tables(whole):
            assert tensor.shape == (320, 32)
            assert torch.equal(tensor[:264], old[name])
            changed = (tensor != begun[name].to(dtype)).any(1).nonzero()[:, 0].tolist()
            assert set(changed) <= set(marks.tolist())
            assert len(changed) >= 6  # one mark stands at ends of answers alone
        else:
            adapted = name.startswith("blocks.") and tensor.ndim == 2
            assert torch.equal(tensor, old[name]) != adapted


def read_frames_of(data: Path) -> Any:
    return read_frames(FinetuneConfig(task="command", data=data).options, "train")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(save_model(folder / "source", request.param), data, folder / "out")
    return folder / "out"


def test_transformers_opens_the_tokenizer(trained: Path, data: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    tokens = FrameTokens(grammar_of(read_frames_of(data)), Tokenizer.load(trained))
    names = mark_names(tokens.grammar)
    assert [theirs.convert_tokens_to_ids(name) for name in names] == tokens.marks.tolist()
    assert theirs("".join(names), add_special_tokens=False)["input_ids"] == tokens.marks.tolist()
    assert theirs.decode([*tokens.marks, *theirs.encode("ok")], skip_special_tokens=True) == "ok"
    assert [theirs.convert_tokens_to_ids(name) for name in CHAT_SPECIAL] == list(range(8))
    assert len(theirs) == 264 + len(names)
    assert theirs.eos_token_id == 1


def test_transformers_opens_the_model(trained: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(trained, dtype=torch.float32).eval()
    ckpt = Checkpoint.open(trained)
    ours = load_decoder(ckpt)
    assert ckpt.config["vocab_size"] == theirs.config.vocab_size == ours.spec.vocab_size == 320
    ids = (IDS + 100) % 271
    with torch.inference_mode():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-3


def test_marks_that_are_there_stay(trained: Path, data: Path, tmp_path: Path) -> None:
    """Training goes on with them; new ones take rows that no token has, as long as there are."""
    again = train(trained, data, tmp_path / "again", lora=2)
    name = "tokenizer.json"
    assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
    assert again.config["vocab_size"] == 320
    more = [*ROWS, {"text": "dim the lamp", "slots": {"place": "lamp"}, "intent": "dim"}]
    wider = train(trained, write_rows(tmp_path / "more", more), tmp_path / "wider", lora=2)
    inner = Tokenizer.load(tmp_path / "wider").inner
    added = [inner.token_to_id(name) for name in ("<|slot:place|>", "<|intent:dim|>")]
    assert added == [271, 272]
    old, new = weights(Checkpoint.open(trained)), weights(wider)
    rows = (old["tokens.weight"] != new["tokens.weight"]).any(1).nonzero()[:, 0].tolist()
    assert set(rows) <= set(range(264, 273))
    assert {271, 272} <= set(rows)
    assert np.array_equal(old["tokens.weight"][:264], new["tokens.weight"][:264])
