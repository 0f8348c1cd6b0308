"""methods/distill on encoders: students, the teacher's cache, resume after kill -9, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_distill import KILLED
from tiny_encoder import VOCAB, quantize_weights, save_tiny, save_tokenizer

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions, Silent
from pocketglm.errors import CheckpointError, PlanError, UnsupportedError, UsageError
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_encoder, spec_of
from pocketglm.stages._cache import usage
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan, PlanStep
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._distill_job import Lessons
from pocketglm.train._encoder_job import prepare_classifier, read_labelled
from pocketglm.train._teacher import Teacher
from pocketglm.train.finetune import finetune, task_config

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32"}
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]
LAYER = "bert.encoder.layer.{}.output.dense.weight"


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "teacher", num_layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """The label is the number of the first word, modulo 3."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 16)):
        numbers = rng.integers(len(WORDS), size=(count, 4))
        rows = [
            {"text": " ".join(WORDS[n] for n in row), "label": f"label {row[0] % 3}"}
            for row in numbers
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


def distill(
    source: Path, out: Path, data: DataOptions, *, seed: int = 0, **settings: Any
) -> Checkpoint:
    step = Plan.single("distill", {**QUICK, **settings}).steps[0]
    compress(source, Plan((PlanStep("distill", step.config),), seed), out, data=data)
    return Checkpoint.open(out)


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    return set(a.tensors) == set(b.tensors) and all(
        np.array_equal(a.read(name), b.read(name)) for name in a.tensors
    )


def saved(teacher: Path, folder: Path, **config: Any) -> Path:
    """A copy of the teacher with other entries in its config.json."""
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    old = json.loads((folder / "config.json").read_bytes())
    write_json(folder / "config.json", old | config)
    return folder


# --- settings and students -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.7, 4.0, "none")),
        ({"preset": "features"}, (0.7, 6.0, "hidden")),
        ({"preset": "features", "features": "relations", "alpha": 0.2}, (0.2, 6.0, "relations")),
        ({"temperature": 2}, (0.7, 2.0, "none")),
    ],
)
def test_presets(given: dict[str, Any], expected: tuple[float, float, str]) -> None:
    config: Any = Plan.single("distill", given).steps[0].config
    assert (config.alpha, config.temperature, config.features) == expected


@pytest.mark.parametrize(
    ("layers", "kept"), [(1, [3]), (2, [1, 3]), (3, [0, 1, 3]), ([0, 2], [0, 2]), (4, [0, 1, 2, 3])]
)
def test_a_student_begins_with_layers_of_the_checkpoint(
    layers: Any, kept: list[int], teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    after = distill(teacher, tmp_path / "out", data, epochs=0, layers=layers)
    before = Checkpoint.open(teacher)
    assert spec_of(after).num_layers == len(kept)
    for number, layer in enumerate(kept):
        ours, theirs = after.read(LAYER.format(number)), before.read(LAYER.format(layer))
        assert np.array_equal(ours, theirs)
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.bias"):
        assert np.array_equal(after.read(name), before.read(name))


def test_layers_of_a_pruned_model(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    """Heads and FFN channels of each layer go with it; its relations are compared all the same."""
    sizes: dict[str, Any] = {"layer_heads": (4, 2, 3), "layer_ffn": (64, 96, 32), "head_dim": 32}
    pruned = save_tiny(tmp_path / "pruned", num_layers=3, **sizes)
    settings: dict[str, Any] = {"teacher": str(teacher), "features": "relations"}
    settings["relation_heads"] = 8
    after = distill(pruned, tmp_path / "out", data, layers=[0, 2], **settings)
    spec = spec_of(after)
    assert (spec.heads(), spec.ffn(), spec.head_dim) == ((4, 3), (64, 32), 32)
    one = distill(pruned, tmp_path / "one", data, layers=1, epochs=0)
    assert (spec_of(one).num_heads, spec_of(one).intermediate_size) == (3, 32)
    with pytest.raises(UnsupportedError, match="layer_heads"):
        distill(pruned, tmp_path / "no", data, student={"num_layers": 2}, init="teacher")


def test_a_student_of_other_sizes(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96}
    after = distill(teacher, tmp_path / "a", data, student=sizes, preset="features")
    spec = spec_of(after)
    assert {name: getattr(spec, name) for name in sizes} == sizes
    assert (spec.vocab_size, spec.num_labels, spec.pooling) == (len(VOCAB), 3, "mean")

    file = tmp_path / "a" / "config.json"
    again = distill(teacher, tmp_path / "b", data, student=str(file), preset="features")
    assert same_weights(after, again)
    other = distill(teacher, tmp_path / "c", data, student=sizes, preset="features", seed=1)
    assert not same_weights(after, other)


@pytest.mark.parametrize("features", ["none", "hidden", "relations"])
def test_a_student_comes_closer_to_its_teacher(
    features: str, teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    """By the teacher's term alone, the labels count nothing."""
    settings: dict[str, Any] = {
        "alpha": 1,
        "layers": 2,
        "features": features,
        "learning_rate": 1e-3,
    }
    before = distill(teacher, tmp_path / "a", data, **settings, epochs=0)
    after = distill(teacher, tmp_path / "b", data, **settings, epochs=4)
    rows = read_labelled(task_config("intent", data)).train
    encoded = Tokenizer.load(teacher).encode([row.text for row in rows], 48)
    ids, mask = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.mask)

    def distance(ckpt: Checkpoint) -> float:
        with torch.inference_mode():
            ours, theirs = load_encoder(ckpt), load_encoder(Checkpoint.open(teacher))
            p, q = theirs(ids, mask).log_softmax(1), ours(ids, mask).log_softmax(1)
            return float((p.exp() * (p - q)).sum(1).mean())

    assert distance(after) < 0.7 * distance(before)


def test_alpha_0_is_plain_fine_tuning(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    """The same weights, and nobody asked the teacher."""
    settings: dict[str, Any] = QUICK | {"epochs": 2, "learning_rate": 1e-3}
    after = distill(teacher, tmp_path / "a", data, **settings | {"alpha": 0})
    finetune(teacher, task_config("intent", data, **settings), tmp_path / "b")
    assert same_weights(after, Checkpoint.open(tmp_path / "b"))
    entries, _ = usage(Path(os.environ["POCKETGLM_CACHE"]))
    assert entries == 1, "the step, and no teacher's outputs"


def test_a_model_without_a_head_learns_from_another_teacher(
    teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", head="embedding", num_labels=0)
    claim = compress(
        base,
        Plan.single("distill", {**QUICK, "teacher": str(teacher)}),
        tmp_path / "out",
        data=data,
    )
    after = Checkpoint.open(tmp_path / "out")
    assert set(after.config["id2label"].values()) == {"label 0", "label 1", "label 2"}
    assert claim.bytes_after == sum(info.nbytes for info in after.tensors.values())
    assert after.manifest.task == "intent"


# --- the teacher's outputs -----------------------------------------------------------------------


def test_weights_that_pruning_made_0_stay_0(
    teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    def zeros(ckpt: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
        return {n: ckpt.read(n) == 0 for n in ckpt.tensors if n.endswith("dense.weight")}

    pruning = Plan.single("prune_unstructured", {"sparsity": 0.5}).steps
    compress(teacher, Plan(pruning), tmp_path / "pruned", data=data)
    before = zeros(Checkpoint.open(tmp_path / "pruned"))
    share = np.mean(np.concatenate([zero.ravel() for zero in before.values()]))
    assert share == pytest.approx(0.5, abs=0.01)
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3}
    for out, more, stay in (("a", {}, True), ("b", {"keep_zeros": False}, False)):
        healed = distill(tmp_path / "pruned", tmp_path / out, data, **settings, **more)
        after = zeros(healed)
        assert all((after[name] == before[name]).all() for name in before) is stay, out
        assert not same_weights(healed, Checkpoint.open(tmp_path / "pruned"))


def test_the_teacher_is_asked_once(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    cache = Path(os.environ["POCKETGLM_CACHE"])
    settings = QUICK | {"augment": 2, "epochs": 3, "patience": 9, "layers": 1}

    def run(out: str, seed: int, **more: Any) -> list[str]:
        notes = Notes()
        step = Plan.single("distill", {**settings, **more}).steps[0]
        plan = Plan((step,), seed)
        compress(teacher, plan, tmp_path / out, data=data, reporter=notes)
        return [line.rpartition(": ")[2] for line in notes.lines if "outputs for" in line]

    assert run("a", 0) == ["kept for other students"] * 3 + ["as computed before"]
    files = {f: f.stat().st_mtime_ns for f in cache.rglob("logits.npy")}
    assert len(files) == 3, "the rows and two copies"
    assert run("b", 1, layers=2, alpha=0.5) == ["as computed before"] * 4
    assert files == {f: f.stat().st_mtime_ns for f in cache.rglob("logits.npy")}
    damaged = min(files)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert sorted(set(run("c", 2))) == ["as computed before", "kept for other students"]
    entries, nbytes = usage(cache)
    assert entries == 6
    assert nbytes > 0


def test_labels_in_another_order(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    """The teacher's logits reach the student's own labels; so do its features."""
    names = {"0": "label 2", "1": "label 0", "2": "label 1"}
    other = saved(teacher, tmp_path / "other", id2label=names)
    config = task_config("intent", data)
    rows = read_labelled(config)
    job = prepare_classifier(Checkpoint.open(teacher), config, rows, Silent())
    asked = Teacher(Checkpoint.open(other), tmp_path / "cache", 48, "hidden", (1, 3), Silent())
    lessons = Lessons(job, Tokenizer.load(teacher), [row.text for row in rows.train], asked)
    batch = lessons.rows().collate(np.array([5, 1, 40]))  # type: ignore[union-attr]
    with torch.inference_mode():
        model = load_encoder(Checkpoint.open(other))
        logits = model(batch["ids"], batch["mask"])
        states = model.hidden(batch["ids"], batch["mask"])
    assert torch.allclose(batch["soft"], logits[:, [1, 2, 0]], atol=1e-5)
    real = batch["mask"].bool()
    assert torch.allclose(batch["features-1"].float()[real], states[real], atol=5e-3)
    assert not batch["features-1"][~real].any()


def test_a_changed_text_keeps_its_label_only_if_the_teacher_agrees(
    teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    config = task_config("intent", data)
    rows = read_labelled(config)
    job = prepare_classifier(Checkpoint.open(teacher), config, rows, Silent())
    texts = [row.text for row in rows.train]
    asked = Teacher(Checkpoint.open(teacher), tmp_path / "cache", 48, "none", (), Silent())
    made: Any = Lessons(job, Tokenizer.load(teacher), texts, asked, 2, 0.5).rows()
    every = np.arange(2 * len(texts))
    first, second, third = (made(epoch).collate(every) for epoch in range(3))
    assert first["hard"][:64].all()
    agrees = first["soft"].argmax(1) == first["labels"]
    assert torch.equal(first["hard"][64:].bool(), agrees[64:])
    assert 0 < agrees[64:].sum() < 64
    assert not torch.equal(first["soft"], second["soft"])
    assert torch.equal(first["soft"], third["soft"]), "two copies take turns"
    alone: Any = Lessons(job, Tokenizer.load(teacher), texts, None, 2, 0.5).rows()
    assert alone(0).collate(every)["hard"].all()


def test_the_teacher_alone_speaks_of_texts_without_labels(
    teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    """An epoch has the next piece of them; their labels do not count, the soft targets do."""
    rows = read_labelled(task_config("intent", data))
    job = prepare_classifier(Checkpoint.open(teacher), task_config("intent", data), rows, Silent())
    texts, new = [row.text for row in rows.train], [f"{word} {word}" for word in WORDS] * 30
    ask = Teacher(Checkpoint.open(teacher), tmp_path, 32, "none", (), Silent())
    lessons: Any = Lessons(job, Tokenizer.load(teacher), texts, ask, 0, 0.3, new).rows()
    count = len(texts)
    batches = [lessons(number) for number in range(3)]
    assert all(len(batch.lengths) == 2 * count for batch in batches)
    second = batches[0].collate(np.arange(count, 2 * count))
    assert not second["hard"].any()
    assert batches[0].collate(np.arange(count))["hard"].all()
    assert torch.isfinite(second["soft"]).all()
    again = batches[2].collate(np.arange(count, 2 * count))
    assert torch.equal(second["ids"], again["ids"]), "180 texts are two pieces of 64"
    other = batches[1].collate(np.arange(count, 2 * count))
    assert not torch.equal(second["soft"], other["soft"])


def test_another_corpus_is_another_step(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text("abc fig\nhij cab\n" * 3)
    first = distill(teacher, tmp_path / "a", data, corpora=[str(file)], layers=1)
    plain = distill(teacher, tmp_path / "b", data, layers=1)
    file.write_text("dab dab\n")
    second = distill(teacher, tmp_path / "c", data, corpora=[str(file)], layers=1)
    assert not same_weights(first, plain)
    assert not same_weights(first, second)


@pytest.mark.parametrize("moment", ["teacher", "train"])
def test_kill_9_and_the_same_command_give_the_same_bytes(
    moment: str, teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    settings = {**QUICK, "epochs": 4, "patience": 9, "layers": 1, "preset": "features"}
    settings |= {"augment": 1, "dropout": 0.1}
    arguments = [teacher, tmp_path / "a", data.path, json.dumps(settings), moment]
    environment = os.environ | {"POCKETGLM_CACHE": str(tmp_path / "cache-a")}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    plan, notes = Plan.single("distill", settings), Notes()
    for out in "ab":
        cache = tmp_path / f"cache-{out}"
        compress(teacher, plan, tmp_path / out, data=data, cache=cache, reporter=notes)
    resumed = [line for line in notes.lines if line.startswith("resuming at step")]
    assert len(resumed) == (moment == "train")
    a, b = (Checkpoint.open(tmp_path / out) for out in "ab")
    assert a.digest() == b.digest()


# --- refusals ------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": 5}, r"layers: 5 of 4: choose 1 to 4"),
    ({"layers": 0}, r"layers: 0 of 4"),
    ({"layers": [0, 4]}, r"there is no layer 4: the model has the layers 0 to 3"),
    ({"layers": [2, 1]}, r"should be ascending"),
    ({"layers": []}, r"the list is empty"),
    ({"layers": 2, "student": {"num_layers": 2}}, r"layers and student are both set"),
    ({"student": {"width": 64}}, r"there is no 'width'"),
    ({"student": {"hidden_size": 100, "num_heads": 3}}, r"not a multiple of num_heads 3"),
    ({"student": {"num_layers": 0}}, r"'num_hidden_layers' should be a positive whole number"),
    ({"student": {"hidden_size": 64}, "init": "teacher"}, r"hidden_size 64 instead of 128"),
    ({"student": {"num_layers": 6}, "init": "teacher"}, r"6 layers, the model only 4"),
    ({"layers": 2, "features": "hidden", "layer_map": {2: 0}}, r"{2: 0} is out of range"),
    ({"layers": 2, "features": "hidden", "layer_map": {0: 4}}, r"the teacher 0 to 3"),
    ({"corpora": ["none.txt"]}, r"corpora: 'none.txt' is no file"),
    ({"corpora": ["none.txt"], "alpha": 0}, r"without a teacher .* nothing says"),
    ({"features": "relations", "relation_heads": 12}, r"12 does not divide 128 features"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_refused_before_any_work(
    settings: dict[str, Any], reason: str, teacher: Path, data: DataOptions, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        distill(teacher, tmp_path / "out", data, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 1.1}, {"alpha": -0.1}, {"temperature": 0}, {"temperature": -1}, {"epochs": -1}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(settings))):
        Plan.single("distill", settings)


def test_refused_teachers(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    names = {"0": "label 0", "1": "label 1", "2": "other"}
    other = saved(teacher, tmp_path / "other", id2label=names)
    with pytest.raises(UnsupportedError, match=r"it does not know 'label 2'(.|\n)*knows 'other'"):
        distill(teacher, tmp_path / "out", data, teacher=str(other))
    embedding = save_tiny(tmp_path / "embedding", head="embedding", num_labels=0)
    with pytest.raises(UnsupportedError, match="is no classifier: train it first"):
        distill(teacher, tmp_path / "out", data, teacher=str(embedding))
    small = saved(teacher, tmp_path / "small")
    save_tokenizer(small, VOCAB[:-2])
    with pytest.raises(UnsupportedError, match="vocabulary lacks '##y', '##z'"):
        distill(teacher, tmp_path / "out", data, teacher=str(small))
    with pytest.raises(UnsupportedError, match="nowhere does not exist"):
        distill(teacher, tmp_path / "out", data, teacher=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_more_tokens(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    """Each side reads the texts by itself; features need the same tokens."""
    large = save_tiny(tmp_path / "large", vocab_size=len(VOCAB) + 1)
    save_tokenizer(large, [*VOCAB, "abc"])
    assert distill(teacher, tmp_path / "out", data, teacher=str(large))
    message = r"rows have other numbers of tokens for the teacher, the first \d+ instead of 14"
    with pytest.raises(UsageError, match=message):
        distill(teacher, tmp_path / "none", data, teacher=str(large), preset="features")


def test_a_student_with_a_trimmed_vocabulary(data: DataOptions, tmp_path: Path) -> None:
    """The same tokens under other numbers: hidden states of changed texts are compared too."""
    settings = {**QUICK, "preset": "features", "augment": 1, "layers": 2}
    steps = Plan.single("trim_vocabulary").steps + Plan.single("distill", settings).steps
    large = save_tiny(tmp_path / "large", vocab_size=len(VOCAB) + 20)
    save_tokenizer(large, [*VOCAB[:5], *(f"word{n}" for n in range(20)), *VOCAB[5:]])
    compress(large, Plan(steps, 0), tmp_path / "out", data=data)
    after = Checkpoint.open(tmp_path / "out")
    assert spec_of(after).vocab_size < len(VOCAB) + 20
    assert [step.method for step in after.manifest.lineage] == ["trim_vocabulary", "distill"]


def test_a_quantized_student_is_refused(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    packed = quantize_weights(
        saved(teacher, tmp_path / "q"), {"query.weight": TensorScheme(bits=8)}
    )
    with pytest.raises(UnsupportedError, match=r"distill first, then quantize; .* qat"):
        distill(packed, tmp_path / "out", data)
    assert distill(teacher, tmp_path / "out", data, teacher=str(packed)), "a teacher may be"


def broken(name: str) -> Callable[[Encoder], None]:
    def change(model: Encoder) -> None:
        model.get_parameter(name)[3, 2] = float("nan")

    return change


def test_nan_is_refused_by_name(teacher: Path, data: DataOptions, tmp_path: Path) -> None:
    bad = save_tiny(tmp_path / "bad", change=broken("blocks.1.ffn.up.weight"))
    message = r"layer\.1\.intermediate\.dense\.weight' holds NaN or infinity, first in row 3"
    with pytest.raises(CheckpointError, match=message):
        distill(bad, tmp_path / "out", data)
    with pytest.raises(CheckpointError, match=message):
        distill(teacher, tmp_path / "out", data, teacher=str(bad))
