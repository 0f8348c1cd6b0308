"""methods/distill on decoders: the loss against a float64 oracle, students, resume, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from killed_distill import KILLED
from oracles import distillation as oracle
from tiny_encoder import quantize_weights, save_tiny

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions
from pocketglm.data.texts import vocabulary_texts
from pocketglm.data.tokenizer_training import save_chat_tokenizer, train_bpe
from pocketglm.errors import UnsupportedError, UsageError
from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.hf import decoder_spec_of, load_decoder, save_decoder
from pocketglm.model.spec import DecoderSpec, RopeSpec
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan, PlanStep
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train import _sequences
from pocketglm.train._distill_decoder import DecoderPupil, Shared, shared_tokens, token_loss
from pocketglm.train._distill_job import Terms
from pocketglm.train._sequences import Sequences
from pocketglm.train._taps import tapped
from pocketglm.train.finetune import finetune, task_config

QUICK: dict[str, Any] = {
    "epochs": 1, "batch_size": 4, "precision": "fp32", "learning_rate": 3e-3, "patience": 9,
}  # fmt: skip
SPEC = DecoderSpec(
    family="glm",
    vocab_size=384,
    hidden_size=48,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=24,
    intermediate_size=64,
    rope=RopeSpec(24, interleaved=True),
    max_position_embeddings=64,
    fused_ffn=True,
    tied=True,
    eos_ids=(1, 5),
    pad_id=0,
)
PLACES = ("kitchen", "hall", "bath", "big room")


def save(folder: Path, data: Path, dtype: torch.dtype | None = None, **over: Any) -> Path:
    model = init_decoder(replace(SPEC, **over), std=0.15)
    manifest = Manifest(task="lm")
    save_decoder(model, folder, source=None, manifest=manifest, dtype=dtype)
    save_chat_tokenizer(train_bpe(vocabulary_texts(data), 384), folder, 64)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """Commands, which are texts too."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = [
        {"text": f"turn the {thing} on in the {place}", "intent": "on",
         "slots": {"thing": thing, "place": place}}
        for place in PLACES for thing in ("lamp", "fan", "heater")
    ]  # fmt: skip
    rows.append({"text": "never mind", "slots": {}, "intent": "oos"})
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataOptions(folder)


@pytest.fixture(scope="module")
def teacher(data: DataOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "teacher", data.path)


def distill(
    source: Path, out: Path, data: DataOptions, *, task: str = "lm", **settings: Any
) -> Checkpoint:
    """The step's checkpoint; its size is as a dry run said."""
    step = Plan.single("distill", {**QUICK, **settings}).steps[0]
    plan = Plan((PlanStep("distill", step.config),), 0)
    claim = compress(source, plan, out, data=data, task=task, dry_run=True)
    done = compress(source, plan, out, data=data, task=task)
    assert claim.bytes_after == done.bytes_after
    return Checkpoint.open(out)


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    return set(a.tensors) == set(b.tensors) and all(
        np.array_equal(a.read(name), b.read(name)) for name in a.tensors
    )


# --- the loss ------------------------------------------------------------------------------------


def rows(choices: bool = False) -> Sequences:
    rng = np.random.default_rng(3)
    ids = [rng.integers(6, 80, length).astype(np.int32) for length in (9, 5, 12)]
    return Sequences(ids, np.array([2, 1, 4]), 0, np.arange(10, 60) if choices else None)


def models(width: int = 32) -> tuple[Decoder, Decoder]:
    small = replace(SPEC, num_layers=2, hidden_size=width, vocab_size=96)
    return init_decoder(small, 1, std=0.6), init_decoder(replace(SPEC, vocab_size=96), 2, std=0.6)


def identical(size: int = 96) -> Shared:
    number = torch.arange(size)
    return Shared(number, number, number, True)


def expected_loss(
    pupil: DecoderPupil, teacher: Decoder, terms: Terms, given: Sequences, shared: Shared
) -> float:
    """Row by row, position by position, without padding."""
    total = 0.0
    pairs = list(terms.pairs.items()) if terms.features == "hidden" else []
    for ids, start in zip(given.ids, given.starts, strict=True):
        row = torch.from_numpy(ids.astype(np.int64))[None]
        own = [pupil.decoder.blocks[a] for a, _ in pairs]
        other = [teacher.blocks[b] for _, b in pairs]
        with torch.inference_mode():
            ours, states = tapped(own, lambda row=row: pupil.decoder(row[:, :-1]))  # type: ignore[misc]
            known = shared.number[row[:, :-1]]
            theirs, shown = tapped(other, lambda known=known: teacher(known))  # type: ignore[misc]
        for place in range(int(start) - 1, len(ids) - 1):
            target = int(ids[place + 1])
            logits, wanted = ours[0, place], theirs[0, place][shared.theirs]
            compared = logits[shared.ours]
            if given.choices is not None:
                if target not in given.choices:
                    continue
                logits, wanted = logits[given.choices], theirs[0, place][given.choices]
                compared, target = logits, list(given.choices).index(target)
            soft = oracle.soft_targets(
                compared[None], wanted[None], terms.temperature, terms.reverse
            )
            hard = oracle.cross_entropy(logits[None], [target], terms.label_smoothing)
            total += float(terms.alpha * soft[0] + (1 - terms.alpha) * hard[0])
            for layer, mine, their in zip(pupil.projections, states, shown, strict=True):
                weight = layer.weight.detach() if isinstance(layer, torch.nn.Linear) else None
                part = oracle.hidden(mine[:, place, None], their[:, place, None], [1], weight)
                total += terms.feature_weight * float(part[0, ...]) / len(pairs)
    return total


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("features", ["none", "hidden"])
def test_the_loss_of_a_batch(reverse: bool, choices: bool, features: Any) -> None:
    terms = Terms(0.7, 1.5, features, 1e-4, {0: 1, 1: 3}, label_smoothing=0.1, reverse=reverse)
    student, teacher = models()
    pupil = DecoderPupil(student, teacher, terms, identical(), 0)
    given = rows(choices)
    total, weight = token_loss(pupil, given.collate(np.arange(3)))
    expected = expected_loss(pupil, teacher, terms, given, identical())
    assert float(total.detach()) == pytest.approx(expected, rel=2e-5)
    assert 0 < float(weight) <= 7 + 4 + 8
    total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in pupil.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    names = {name.partition(".")[0] for name, _ in pupil.named_parameters()}
    assert names == ({"decoder", "projections"} if features == "hidden" else {"decoder"})

    swapped = replace(terms, reverse=not reverse)
    assert abs(expected_loss(pupil, teacher, swapped, given, identical()) / expected - 1) > 1e-3


def test_parts_of_a_batch_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    terms, losses = Terms(0.7, 3.0), []
    for values in (1 << 25, 96 * 5):
        monkeypatch.setattr(_sequences, "_LOGITS", values)
        pupil = DecoderPupil(*models(), terms, identical(), 0)
        total, _ = token_loss(pupil, rows().collate(np.arange(3)))
        total.backward()  # type: ignore[no-untyped-call]
        gradient = pupil.decoder.tokens.weight.grad
        assert gradient is not None
        losses.append((float(total.detach()), float(gradient.norm())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def letters(order: str) -> Tokenizer:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: n for n, c in enumerate(order)}, unk_token=order[0])
    )
    return Tokenizer(made, {})


def test_a_teacher_that_numbers_its_tokens_in_another_way() -> None:
    """Its logits are those of the student's tokens, by name; rows without a token do not count."""
    student, teacher = letters("abcdefgh"), letters("?hgfedcbaxyz")
    shared = shared_tokens(student, teacher, (96, 96))
    assert not shared.same
    assert shared.theirs.tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert shared_tokens(student, student, (96, 96)).same
    assert not shared_tokens(student, student, (96, 104)).same
    ids = [np.array([1, 5, 2, 7, 0], np.int32), np.array([3, 3, 6], np.int32)]
    given = Sequences(ids, np.array([1, 2]), 0)
    terms = Terms(0.6, 2.0)
    pupil = DecoderPupil(*models(), terms, shared, 0)
    total, _ = token_loss(pupil, given.collate(np.arange(2)))
    expected = expected_loss(pupil, models()[1], terms, given, shared)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)


# --- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_comes_closer_to_its_teacher(
    reverse: bool, teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"alpha": 1, "layers": 2, "temperature": 2, "reverse": reverse}
    before = distill(teacher, tmp_path / "a", data, **settings, epochs=0)
    after = distill(teacher, tmp_path / "b", data, **settings, epochs=8)
    ids = torch.from_numpy(Tokenizer.load(teacher).encode(["turn the lamp on in the hall"], 64).ids)

    def distance(ckpt: Checkpoint) -> float:
        with torch.inference_mode():
            p = load_decoder(Checkpoint.open(teacher))(ids).log_softmax(-1)
            q = load_decoder(ckpt)(ids).log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())

    assert decoder_spec_of(after).num_layers == 2
    assert distance(after) < 0.8 * distance(before)


def test_no_epochs_and_no_other_student_change_nothing(data: DataOptions, tmp_path: Path) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        source = save(tmp_path / name, data.path, dtype)
        after = distill(source, tmp_path / f"{name}-out", data, epochs=0)
        assert same_weights(after, Checkpoint.open(source))


def test_alpha_0_is_plain_fine_tuning(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    after = distill(teacher, tmp_path / "a", data, alpha=0)
    finetune(teacher, task_config("lm", data, **QUICK), tmp_path / "b")
    assert same_weights(after, Checkpoint.open(tmp_path / "b"))


def test_students_of_other_sizes(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden_size": 32, "head_dim": 16, "intermediate_size": 40}
    after = distill(teacher, tmp_path / "a", data, student=sizes, preset="features")
    spec = decoder_spec_of(after)
    assert {name: getattr(spec, name) for name in sizes} == sizes
    assert (spec.vocab_size, spec.rope.dims, spec.eos_ids) == (384, 16, (1, 5))
    file = str(tmp_path / "a" / "config.json")
    again = distill(teacher, tmp_path / "b", data, student=file, preset="features")
    assert same_weights(after, again)
    named = distill(teacher, tmp_path / "c", data, student="autoglm-nano", epochs=0)
    assert (decoder_spec_of(named).hidden_size, decoder_spec_of(named).vocab_size) == (256, 384)


def test_a_student_of_commands(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    """From a model that has never seen a command: its new tokens are those of the teacher."""
    finetune(teacher, task_config("command", data, **QUICK), tmp_path / "teacher")
    size = Tokenizer.load(teacher).size
    base = save(tmp_path / "base", data.path, num_layers=1, vocab_size=size)
    settings = {"teacher": str(tmp_path / "teacher"), "features": "hidden", "slot_swap": 0.5}
    after = distill(base, tmp_path / "out", data, task="command", **settings)
    assert after.manifest.command is not None
    assert set(after.manifest.command.intents) == {"on", "oos"}
    grown = decoder_spec_of(after).vocab_size
    assert grown % 64 == 0
    assert grown > size
    assert after.manifest.lineage[-1].effect["validation_exact_match"] >= 0


def test_kill_9_and_the_same_command_give_the_same_bytes(
    teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    settings = {**QUICK, "epochs": 4, "layers": 1, "preset": "features", "dropout": 0.1}
    arguments = [teacher, tmp_path / "a", data.path, json.dumps(settings), "train"]
    environment = os.environ | {"POCKETGLM_CACHE": str(tmp_path / "cache-a")}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache-a").rglob("training.pt"))
    for out in "ab":
        cache = tmp_path / f"cache-{out}"
        compress(teacher, Plan.single("distill", settings), tmp_path / out, data=data, cache=cache)
    a, b = (Checkpoint.open(tmp_path / out) for out in "ab")
    assert a.digest() == b.digest()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"features": "relations"}, "relations are for encoders"),
    ({"augment": 2}, "augment is for encoders"),
    ({"slot_swap": 0.5}, "slot_swap and made_up are for commands"),
    ({"layers": 5}, "layers: 5 of 4: choose 1 to 4"),
    ({"student": "autoglm-giant"}, "neither a size nor a file"),
    ({"student": {"pooling": 1}}, "there is no 'pooling'"),
    ({"student": {"num_heads": 3, "num_kv_heads": 2}}, "not a multiple of 2 key/value heads"),
    ({"student": {"hidden_size": 0}}, "'hidden_size' should be a positive whole number"),
    ({"student": {"hidden_size": 32}, "init": "teacher"}, "hidden_size 32 instead of 48"),
    ({"features": "hidden", "layer_map": {4: 0}}, "out of range"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_refused_before_any_work(
    settings: dict[str, Any], reason: str, teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        distill(teacher, tmp_path / "out", data, **settings)
    assert list(tmp_path.iterdir()) == []


def test_refused_teachers_and_students(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"the teacher's vocabulary lacks '.*on"):
        distill(teacher, tmp_path / "out", data, task="command")
    encoder = save_tiny(tmp_path / "encoder")
    with pytest.raises(UnsupportedError, match="is an encoder"):
        distill(teacher, tmp_path / "out", data, teacher=str(encoder))
    with pytest.raises(UnsupportedError, match="distilled for intent, the task is lm"):
        distill(encoder, tmp_path / "out", data)
    short = save(tmp_path / "short", data.path, max_position_embeddings=16)
    with pytest.raises(UsageError, match=r"the teacher 16 positions"):
        distill(teacher, tmp_path / "out", data, teacher=str(short))
    packed = save(tmp_path / "packed", data.path)
    quantize_weights(packed, {"q_proj.weight": TensorScheme(bits=8)})
    with pytest.raises(UnsupportedError, match="distill first, then quantize"):
        distill(packed, tmp_path / "out", data)
