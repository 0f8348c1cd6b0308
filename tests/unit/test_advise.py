"""`advise`: what fits, why something does not, and what to change; held against its own numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_decoder import save_tiny_decoder
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.schemas import AdviceRow, AdviseResult, RangeResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.devices.profile import PROFILES
from pocketglm.devices.recipes import recipe_book
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.stages._advice_limits import size_words
from pocketglm.stages._advice_models import count_words
from pocketglm.stages.advise import Wanted, advise

# Units that exports were never run on.
NOT_RUN = {
    *((runtime, unit) for runtime in ("litert", "executorch") for unit in ("gpu", "npu")),
    *(("coreml", unit) for unit in ("cpu", "gpu", "npu")),
}
PHONE = "snapdragon-8-gen-3"
GOOD = ("yes", "probably")


def rows_of(result: AdviseResult, **wanted: Any) -> list[AdviceRow]:
    return [
        row for row in result.rows if all(getattr(row, k) == value for k, value in wanted.items())
    ]


def edited(folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "xiaomi-14") -> str:
    """The path of a profile with something changed; idle sources go."""
    profile = yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    edit(profile)
    named = set(re.findall(r"'source': '([^']+)'", str(profile)))
    profile["sources"] = {key: value for key, value in profile["sources"].items() if key in named}
    file = folder / "my-phone.yaml"
    file.write_text(yaml.safe_dump(profile), encoding="utf-8")
    return str(file)


# --- the reference's conclusion -----------------------------------------------------------------


@pytest.mark.parametrize("task", ["command", "lm"])
def test_tiny_and_mini_fit_a_flagship_phone(task: str) -> None:
    result = advise(PHONE, task=task)
    for model in ("autoglm-tiny", "autoglm-mini"):
        assert any(row.fits in GOOD for row in rows_of(result, model=model, available=True))


def test_base_in_16_or_32_bits_does_not() -> None:
    """As an assistant that acts: on nothing that reaches it. As a chat: not on the processor."""
    floats = [
        row
        for row in rows_of(advise(PHONE, task="command"), model="autoglm-base")
        if row.recipe in ("fp16", "fp32")
    ]
    assert {row.unit for row in floats} >= {"cpu", "gpu"}
    assert not any(row.fits in GOOD for row in floats)
    chat = rows_of(advise(PHONE, task="lm"), model="autoglm-base", unit="cpu")
    assert all(row.fits == "no" for row in chat if row.recipe in ("fp16", "fp32"))


# --- one row ------------------------------------------------------------------------------------


def test_the_reason_is_one_line_with_need_and_limit() -> None:
    [known] = rows_of(advise(PHONE), model="autoglm-base", recipe="int4", runtime="onnx")
    assert known.memory_mb is not None
    for limit, needs in (
        (known.memory_mb.value * 0.9, f"needs {size_words(known.memory_mb.value)}"),
        (known.memory_mb.high * 0.98, f"may need {size_words(known.memory_mb.high)}"),
    ):
        result = advise(PHONE, wanted=Wanted(max_memory_mb=limit))
        [row] = rows_of(result, model="autoglm-base", recipe="int4", runtime="onnx")
        at = f"at 2k context, the limit is {size_words(limit)}"
        assert row.reason.startswith(f"Base 1.1 B INT4 {needs} {at}")
        assert row.fits == "no"
        assert "memory" in row.exceeds


def test_the_reason_names_what_an_app_gets() -> None:
    result = advise("redmi-12c")
    [row] = rows_of(result, model="autoglm-base", recipe="int4", runtime="onnx")
    assert re.match(
        r"Base 1\.1 B INT4 needs \d\.?\d* GB at 2k context, an app here gets 0\.8 GB", row.reason
    )


@pytest.mark.parametrize(
    ("mb", "words"),
    [(22.8, "23 MB"), (800, "0.8 GB"), (951, "0.95 GB"), (2210, "2.2 GB"), (6000, "6 GB")],
)
def test_sizes_in_words(mb: float, words: str) -> None:
    assert size_words(mb) == words


def test_counts_in_words() -> None:
    assert [count_words(n) for n in (3_020_000, 97_900_000, 999_000_000, 1_470_000_000)] == [
        "3.0 M", "98 M", "1.0 B", "1.5 B",
    ]  # fmt: skip


def test_verdicts_follow_from_the_row_and_the_limits() -> None:
    for task in recipe_book().tasks:
        result = advise("pixel-6", task=task)
        limits = {limit.name: limit.value for limit in result.limits}
        for row in result.rows:
            time = row.first_token_ms if result.judged == "first token" else row.latency_ms
            if row.memory_mb is None or time is None:
                continue
            speed = row.tokens_per_second
            late = time.value > limits["latency"] * 1.01
            slow = "speed" in limits and speed is not None and speed.value < limits["speed"] * 0.99
            if row.memory_mb.high > limits["memory"] * 1.01 or late or slow:
                assert row.fits == "no"
            if row.fits == "yes":
                assert time.high <= limits["latency"] * 1.01
            assert bool(row.reason) == (row.fits in ("no", "unknown"))


def test_only_what_can_be_made_has_commands_and_a_new_target_needs_no_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = advise(PHONE)
    targets = registry.names("targets")
    for row in result.rows:
        known = row.runtime in targets
        assert row.available == (known and (row.runtime, row.unit) not in NOT_RUN)
        assert bool(row.commands) == row.available
        if known and not row.available:
            assert f"target {row.runtime} were not run on a {row.unit}" in row.notes[0]
        elif not known:
            assert row.notes[0] == f"predicted only: target {row.runtime} is not in this version"
    own = registry.names
    fewer = [name for name in targets if name != "executorch"]
    monkeypatch.setattr(registry, "names", lambda kind: fewer if kind == "targets" else own(kind))
    assert not rows_of(advise(PHONE), runtime="executorch", available=True)
    monkeypatch.setattr(registry, "names", own)
    assert rows_of(advise(PHONE), runtime="executorch", available=True)


def test_commands_are_whole() -> None:
    best = advise("pixel-6").best
    assert best is not None
    text = "\n".join(best.commands)
    assert f"--plan {best.plan}" in text
    assert (Path(__file__).parents[2] / str(best.plan)).is_file()
    verbs = re.findall(r"pocketglm (\w+)", text)
    assert verbs[-3:] == ["compress", "export", "prove"]
    assert set(verbs) <= set(registry.names("cli"))
    assert "--max-length 2048" in text
    intent = advise("pixel-6", task="intent")
    assert intent.best is not None
    assert [line.split()[1] for line in intent.best.commands[1:]] == [
        "train", "compress", "export", "prove",
    ]  # fmt: skip
    assert 'train "$MINILM" --task intent --data DATA' in "\n".join(intent.best.commands)
    learns = rows_of(intent, recipe="encoder-12x", available=True)[0]
    assert "encoder-12x.yaml --task intent --data DATA" in "\n".join(learns.commands)


def test_a_loss_says_on_what_and_by_whom() -> None:
    result = advise(PHONE)
    [base] = rows_of(result, model="autoglm-base", recipe="int8", runtime="onnx")
    [loss] = base.losses
    assert (loss.metric, loss.unit, loss.ours) == ("perplexity", "%", False)
    assert str(loss.address).startswith("https://")
    [row] = rows_of(advise(PHONE, task="intent"), recipe="int8", runtime="onnx")
    assert {loss.metric for loss in row.losses} == {"in-scope accuracy", "out-of-scope recall"}
    assert all(loss.ours and "benchmarks/encoder.md" in loss.source for loss in row.losses)
    assert max(loss.value for loss in row.losses if "in-scope" in loss.metric) == 0.09
    [unknown] = rows_of(advise(PHONE, task="embed"), recipe="int8", runtime="onnx")
    assert unknown.losses == []


def test_shapes_scale_what_is_predicted() -> None:
    """More bits, a longer cache, a longer prompt: more memory and time, never less."""
    result = advise(PHONE)

    def one(found: AdviseResult, recipe: str) -> AdviceRow:
        return rows_of(found, model="autoglm-mini", recipe=recipe, runtime="onnx")[0]

    def value(range_: RangeResult | None) -> float:
        assert range_ is not None
        return range_.value

    fp32, int8, int4 = (one(result, recipe) for recipe in ("fp32", "int8", "int4"))
    assert fp32.file_mb > int8.file_mb > int4.file_mb
    for less, more in ((int4, int8), (int8, fp32)):
        assert value(less.memory_mb) < value(more.memory_mb)
        assert value(less.tokens_per_second) > value(more.tokens_per_second)
    short = one(advise(PHONE, wanted=Wanted(context=256, prompt=64)), "int4")
    assert value(short.memory_mb) < value(int4.memory_mb)
    assert value(short.first_token_ms) < value(int4.first_token_ms)


# --- ranking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(recipe_book().tasks))
def test_the_order(task: str) -> None:
    result = advise("pixel-8-pro", task=task)
    order = [(row.fits not in GOOD, not row.available) for row in result.rows]
    good = [pair for pair in order if not pair[0]]
    assert order[: len(good)] == sorted(good)
    assert all(pair[0] for pair in order[len(good) :])
    made = [row for row in result.rows if row.fits in GOOD and row.available]
    assert result.best == made[0]
    keys = [(row.accuracy is None, not row.losses and row.recipe != "fp32") for row in made]
    assert keys == sorted(keys)
    sizes = {row.model: row.parameters for row in made if row.recipe == "fp32"}
    known = [sizes[row.model] for row in made if row.losses and row.model in sizes]
    assert task == "command" or known == sorted(known, reverse=True)
    unknown = [row.fits for row in result.rows if row.fits not in GOOD]
    assert unknown == sorted(unknown, reverse=True)  # unknown before no


def test_equal_models_are_ranked_by_loss_then_time() -> None:
    result = advise("pixel-6", task="intent")
    made = [row.recipe for row in result.rows if row.fits in GOOD and row.available]
    # INT8 lost nothing that one could measure, as fp32, and is faster; 12x lost some recall.
    assert made.index("int8") < made.index("fp32") < made.index("encoder-12x")
    assert made.index("encoder-16x") < made.index("encoder-12x")  # by the measured loss
    assert made.index("encoder-12x") < made.index("encoder-8x")


def test_a_measured_accuracy_comes_first() -> None:
    result = advise(PHONE, task="command")
    assert result.best is not None
    assert (result.best.model, result.best.accuracy is None) == ("autoglm-nano", False)


def test_it_gives_the_same_twice() -> None:
    assert advise("pixel-6") == advise("pixel-6")


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"max_memory_mb": 0}, "--max-memory-mb 0: should be a number above 0"),
        ({"max_memory_mb": -5}, "--max-memory-mb -5"),
        ({"max_latency_ms": math.nan}, "--max-latency-ms nan"),
        ({"max_latency_ms": math.inf}, "--max-latency-ms inf"),
        ({"context": 0}, "--context 0"),
        ({"prompt": -1}, "--prompt -1"),
        ({"new_tokens": -1}, "--new-tokens -1"),
        ({"min_accuracy": 0}, "--min-accuracy 0"),
        ({"min_accuracy": 101}, "--min-accuracy 101: nothing is right more than 100 %"),
        ({"runtime": "onyx"}, "unknown runtime 'onyx'"),
        ({"runtime": "coreml"}, "--runtime coreml: not for decoders on Xiaomi 14"),
    ],
)
def test_limits_that_cannot_be(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        advise(PHONE, task="command", wanted=Wanted(**wanted))
    assert message in error.value.message


def test_limits_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match=r"--context 100 .* 92 too many") as error:
        advise(PHONE, wanted=Wanted(context=100))
    assert "--context 192 or more" in error.value.hint
    with pytest.raises(UsageError, match="'intent' is an encoder's"):
        advise(PHONE, task="intent", wanted=Wanted(new_tokens=5))
    with pytest.raises(UsageError, match="'lm' has no accuracy"):
        advise(PHONE, task="lm", wanted=Wanted(min_accuracy=90))


def test_less_memory_than_the_smallest_model_needs() -> None:
    """It says which model, and by how much."""
    with pytest.raises(UsageError) as error:
        advise(PHONE, task="command", wanted=Wanted(max_memory_mb=1))
    assert re.search(
        r"--max-memory-mb 1 is .+ less than the smallest model needs at best: Nano 3\.0 M",
        error.value.message,
    )
    found = re.fullmatch(r"use (\d+) or more", error.value.hint)
    assert found
    advise(PHONE, task="command", wanted=Wanted(max_memory_mb=int(found[1])))  # is not refused


def test_more_memory_than_an_app_gets_is_clipped_and_said() -> None:
    result = advise("redmi-12c", wanted=Wanted(max_memory_mb=4000))
    assert [limit.value for limit in result.limits if limit.name == "memory"] == [800]
    assert "--max-memory-mb 4000 is more than an app gets there: 800 MB" in result.notes[0]
    assert result.rows == advise("redmi-12c").rows


def test_accuracy_as_percent_or_fraction() -> None:
    for given in (0.96, 96):
        result = advise(PHONE, task="intent", wanted=Wanted(min_accuracy=given))
        good = {row.recipe for row in result.rows if row.fits in GOOD}
        assert good == {"fp32", "int8"}
        [unknown] = rows_of(result, recipe="int4-encoder", runtime="onnx")
        assert unknown.fits == "unknown"
        assert "is not measured" in unknown.reason
    assert advise(PHONE, task="intent", wanted=Wanted(min_accuracy=97)).fits is False


def test_more_context_than_a_model_has_positions() -> None:
    rows = rows_of(advise(PHONE, wanted=Wanted(context=4096)), recipe="int4", runtime="onnx")
    mini = next(row for row in rows if row.model == "autoglm-mini")
    assert (mini.fits, mini.exceeds[0]) == ("no", "context")
    assert "has 2,048 positions, 4,096 are asked for" in mini.reason


# --- where nothing fits -------------------------------------------------------------------------

HARD: list[tuple[str, str, dict[str, Any]]] = [
    ("redmi-12c", "lm", {"max_latency_ms": 5}),
    ("pixel-6", "command", {"max_latency_ms": 0.5}),
    ("pixel-6", "intent", {"max_latency_ms": 0.01}),
    ("pixel-6", "intent", {"min_accuracy": 99}),
    ("pixel-6", "lm", {"min_tokens_per_second": 1e5}),
    ("pixel-6", "lm", {"context": 100_000}),
]


@pytest.mark.parametrize(("device", "task", "wanted"), HARD)
def test_a_hint_that_is_followed_helps(device: str, task: str, wanted: dict[str, Any]) -> None:
    result = advise(device, task=task, wanted=Wanted(**wanted))
    assert (result.fits, result.best) == (False, None)
    assert "edge node" in result.hints[-1]
    tried = 0
    for hint in result.hints[:-1]:
        changes = dict(re.findall(r"(--[\w-]+)(?: to)? ([\d.e+]+)", hint))
        if not changes:
            continue
        settings = {
            name.removeprefix("--").replace("-", "_"): float(value)
            for name, value in changes.items()
        }
        new = Wanted.model_validate(wanted | settings)
        assert advise(device, task=task, wanted=new).fits, hint
        tried += 1
    assert tried


def test_the_edge_node_where_memory_is_not_to_be_had(tmp_path: Path) -> None:
    def small(profile: dict[str, Any]) -> None:
        profile["app_memory_mb"]["value"] = 20

    result = advise(edited(tmp_path, small))
    assert not result.fits
    assert any("an app here gets 20 MB" in hint for hint in result.hints)
    assert "edge node" in result.hints[-1]


# --- devices ------------------------------------------------------------------------------------


def test_an_unknown_device_or_task() -> None:
    with pytest.raises(UsageError, match="unknown device 'xiomi-14'") as error:
        advise("xiomi-14")
    assert "xiaomi-14" in error.value.hint
    with pytest.raises(UsageError, match="unknown task 'intents'") as error:
        advise(PHONE, task="intents")
    assert "did you mean 'intent'" in error.value.hint


def test_a_device_of_which_little_is_known(tmp_path: Path) -> None:
    def unknown(profile: dict[str, Any]) -> None:
        profile["bandwidth_gbs"] = None
        profile["bandwidth_measured_gbs"] = None
        profile["accelerators"] = []

    result = advise(edited(tmp_path, unknown))
    assert (result.device, result.fits) == ("my-phone", False)
    [row] = rows_of(result, model="autoglm-tiny", recipe="int8", runtime="onnx")
    assert row.fits == "unknown"
    assert "bandwidth" in row.reason
    assert result.hints


def test_a_device_whose_app_memory_is_unknown(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda profile: profile.update(app_memory_mb=None))
    result = advise(file)
    assert result.app_memory_mb is None
    assert not result.fits
    assert any("is not known: give --max-memory-mb" in note for note in result.notes)
    given = advise(file, wanted=Wanted(max_memory_mb=4000))
    assert given.fits
    assert "what an app" not in " ".join(given.notes)


def test_units_are_those_that_the_profile_says_a_runtime_reaches(tmp_path: Path) -> None:
    units = {(row.runtime, row.unit) for row in advise(PHONE).rows}
    assert {("litert", "gpu"), ("litert", "npu"), ("executorch", "npu")} <= units
    assert not {("gguf", "gpu"), ("onnx", "gpu"), ("onnx", "npu")} & units
    phone = {row.runtime for row in advise("iphone-15-pro").rows}
    assert phone == {"onnx", "litert", "executorch", "coreml", "gguf"}
    only = advise(PHONE, wanted=Wanted(runtime="onnx"))
    assert {row.runtime for row in only.rows} == {"onnx"}
    none = advise(edited(tmp_path, lambda profile: profile.update(accelerators=[])))
    assert {row.unit for row in none.rows} == {"cpu"}
    assert not any(row.recipe == "fp32" for row in advise(PHONE).rows if row.unit == "npu")


# --- a checkpoint of the user's -----------------------------------------------------------------


def test_a_decoder_of_the_users(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path / "mine", "glm-wide")
    result = advise(PHONE, checkpoint=tmp_path / "mine", wanted=Wanted(context=48, prompt=32,
                                                                       new_tokens=8))  # fmt: skip
    assert (result.task, result.checkpoint) == ("lm", str(tmp_path / "mine"))
    assert {row.model for row in result.rows} == {"mine"}
    assert {"fp32", "int8", "int4"} <= {row.recipe for row in result.rows}
    assert result.best is not None
    text = "\n".join(result.best.commands)
    assert str(tmp_path / "mine") in text
    assert "pocketglm init" not in text
    assert all(row.accuracy is None for row in result.rows)
    stored = sum(f.stat().st_size for f in (tmp_path / "mine").glob("*.safetensors"))
    [fp32] = rows_of(result, recipe="fp32", runtime="onnx")
    assert fp32.file_mb * 1e6 == pytest.approx(stored, rel=0.2)


def test_an_encoder_of_the_users(tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine")
    result = advise(PHONE, checkpoint=tmp_path / "mine")
    assert result.task == "intent"
    assert not rows_of(result, recipe="encoder-12x")  # it has two layers already
    save_tiny(tmp_path / "vectors", head="embedding", num_labels=0)
    assert advise(PHONE, checkpoint=tmp_path / "vectors").task == "embed"
    with pytest.raises(UsageError, match="is an encoder; task 'lm' needs a decoder"):
        advise(PHONE, checkpoint=tmp_path / "mine", task="lm")


def test_a_quantized_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "q")
    quantize_weights(tmp_path / "q", {"weight": TensorScheme(bits=8, activation="dynamic_tensor")})
    result = advise(PHONE, checkpoint=tmp_path / "q")
    assert {row.recipe for row in result.rows} == {"as-it-is"}
    assert result.best is not None
    assert not any("compress" in line for line in result.best.commands)
    assert result.best.losses == []


def test_groups_that_do_not_divide_are_told(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path / "odd", "llama", intermediate_size=72)
    result = advise(PHONE, checkpoint=tmp_path / "odd", wanted=Wanted(context=48, prompt=32,
                                                                      new_tokens=8))  # fmt: skip
    [row] = rows_of(result, recipe="int4", runtime="onnx")
    assert (row.fits, row.available, row.commands) == ("no", False, [])
    assert "groups of 32 do not divide" in row.reason


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        advise(PHONE, checkpoint=tmp_path / "nothing")
    save_tiny(tmp_path / "mine")
    (tmp_path / "cut").mkdir()
    for file in (tmp_path / "mine").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        advise(PHONE, checkpoint=tmp_path / "cut")
    shutil.copy(tmp_path / "mine" / "model.safetensors", weights)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match=r"its config\.json asks for"):
        advise(PHONE, checkpoint=tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="unknown architecture 'mamba'"):
        advise(PHONE, checkpoint=tmp_path / "cut")
