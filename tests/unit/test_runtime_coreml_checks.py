"""The wrong programs that the converter writes without a word, and damaged packages: all are seen.

Each is planted with the real converter.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreml_models import SLOTS, STATES, TinyDecoder, build, convert, torch_logits

from pocketglm.errors import CheckpointError, UnsupportedError, UsageError
from pocketglm.runtimes._coreml_check import check_program
from pocketglm.runtimes._coreml_eval import Evaluator, Precision
from pocketglm.runtimes._coreml_file import read_package

pytest.importorskip("coremltools")

IDS = (3, 17, 39, 5, 5, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def right(folder: Path) -> Path:
    return convert(TinyDecoder(), folder / "right.mlpackage")


def steps(path: Path, precision: Precision = "float16") -> Any:
    """Logits [S, V] of IDS, one token a call."""
    evaluator = Evaluator(read_package(path), precision=precision)
    state = evaluator.new_state()
    kind = np.int32 if evaluator.inputs["input_ids"].type.dtype == "int32" else np.float32
    calls = (
        {"input_ids": np.array([[token]], kind), "position": np.array([place], np.int32)}
        for place, token in enumerate(IDS)
    )
    return np.concatenate([evaluator.run(call, state)["logits"][0] for call in calls])


def error(found: Any) -> float:
    return float(np.abs(found - torch_logits(IDS)).max())


@pytest.mark.parametrize(("precision", "limit"), [("float16", 5e-3), ("float32", 1e-3)])
def test_a_right_program(right: Path, precision: Precision, limit: float) -> None:
    assert check_program(read_package(right), STATES) == []
    assert error(steps(right, precision)) < limit


def test_a_float32_program_with_a_half_state(folder: Path) -> None:
    path = convert(TinyDecoder(), folder / "float32.mlpackage", half=False)
    assert check_program(read_package(path), STATES) == []
    assert error(steps(path, "float16")) < 1e-3
    assert error(steps(path, "float32")) < 1e-5


def test_a_dropped_state_write(folder: Path) -> None:
    path = convert(TinyDecoder("index_put"), folder / "dropped.mlpackage")
    assert check_program(read_package(path)) == [
        f"main: the state {name} is written by no operation: the write was dropped"
        for name in STATES
    ]
    assert error(steps(path)) > 0.1


def test_a_missing_state(folder: Path) -> None:
    path = convert(TinyDecoder(), folder / "missing.mlpackage", states=False)
    package = read_package(path)
    assert not package.function().states
    found = check_program(package, STATES)
    assert [f"main: there is no state {name}: the cache is lost" for name in STATES] == found[:2]
    # Without being told which states there should be, it still sees where the writes go.
    assert all("writes into a constant" in words for words in check_program(package))
    assert len(check_program(package)) == 2
    assert error(steps(path)) > 0.1


def test_a_wrongly_typed_select(folder: Path) -> None:
    model = TinyDecoder(masked=True)
    path = convert(model, folder / "select.mlpackage", 4, flexible=True)
    package = read_package(path)
    (problem,) = check_program(package)
    words = rf"main: select \w+: computes fp16\[\?, {SLOTS}\], the program declares \w+ as fp16\[\]"
    with pytest.raises(CheckpointError, match=words) as caught:
        Evaluator(package)
    assert caught.value.message == problem


def test_flexible_shapes_without_select(folder: Path) -> None:
    path = convert(TinyDecoder(every=True), folder / "flexible.mlpackage", 4, flexible=True)
    assert check_program(read_package(path), STATES) == []
    evaluator = Evaluator(read_package(path), precision="float16")
    for count in (1, 4, len(IDS)):
        ids = np.array([IDS[:count]], np.int32)
        call = {"input_ids": ids, "position": np.array([0], np.int32)}
        found = evaluator.run(call, evaluator.new_state())["logits"][0]
        assert float(np.abs(found - torch_logits(IDS)[:count]).max()) < 5e-3
    ids = np.zeros((1, SLOTS + 1), np.int32)
    with pytest.raises(UsageError, match=rf"input_ids is int32\[1, 13\].* sizes 1..1, 1..{SLOTS}"):
        evaluator.run({"input_ids": ids, "position": np.zeros(1, np.int32)}, evaluator.new_state())


def test_untyped_ids(folder: Path) -> None:
    path = convert(TinyDecoder(), folder / "untyped.mlpackage", ids_type=None)
    (problem,) = check_program(read_package(path), STATES)
    assert problem.startswith("main: the input input_ids is fp16[1, 1] and is used as indices")
    # Small ids still give the right logits: the types alone tell.
    assert error(steps(path)) < 5e-3
    call = {"input_ids": np.array([[3]], np.int32), "position": np.array([0], np.int32)}
    evaluator = Evaluator(read_package(path))
    with pytest.raises(UsageError, match=r"input_ids is int32\[1, 1\], main takes fp16\[1, 1\]"):
        evaluator.run(call, evaluator.new_state())


# --- weight.bin ---------------------------------------------------------------------------------

FLOATS = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)


def quantized(path: Path) -> Path:
    """x [1, 64] times int4 weights [4, 64], groups of 32."""
    integers = (np.arange(256) % 16 - 8).reshape(4, 64)
    scale = np.full((4, 2), 0.5, np.float16)

    def function(mb: Any, types: Any, x: Any) -> Any:
        data = integers.astype(types.nptype_from_builtin(types.int4))
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name="weight")
        return [mb.linear(x=x, weight=weight, bias=np.zeros(4, np.float16), name="y")]

    return build(path, function, {"x": ((1, 64), "fp16")})


def test_one_flipped_nibble_changes_the_output(folder: Path) -> None:
    path = quantized(folder / "nibble.mlpackage")
    x = {"x": FLOATS[:1]}
    before = Evaluator(read_package(path)).run(x)["y"]
    integers = read_package(path).stored("weight")["data"].copy()
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    low, high = (integers.reshape(-1)[place::2] & 15 for place in (0, 1))
    start = content.index((low | high << 4).astype(np.uint8).tobytes())
    content[start] ^= 0x10  # the second value: low nibbles come first
    file.write_bytes(content)
    after = read_package(path).stored("weight")["data"]
    assert np.argwhere(after != integers).tolist() == [[0, 1]]
    changed = Evaluator(read_package(path)).run(x)["y"] - before
    difference = (int(after[0, 1]) - int(integers[0, 1])) * 0.5 * FLOATS[0, 1]
    assert changed[0, 0] == pytest.approx(difference, rel=1e-4)
    assert not changed[0, 1:].any()


@pytest.fixture
def damaged(right: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(right, tmp_path / "damaged.mlpackage"))


def _cut(path: Path) -> None:
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    file.write_bytes(file.read_bytes()[:100])


def _erase(path: Path) -> None:
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    file.write_bytes(bytes(len(file.read_bytes())))


def _no_weights(path: Path) -> None:
    (path / "Data/com.apple.CoreML/weights/weight.bin").unlink()


def _garbled(path: Path) -> None:
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"\xff" * 99)


def _other_kind(path: Path) -> None:
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"\x08\x09")


def _no_model(path: Path) -> None:
    (path / "Data/com.apple.CoreML/model.mlmodel").unlink()


def _no_manifest(path: Path) -> None:
    (path / "Manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "ends before byte|has no constant at byte"),
        (_erase, "has no constant at byte"),
        (_no_weights, "weight.bin is missing"),
        (_garbled, "model.mlmodel is damaged"),
        (_other_kind, "is not an ML program"),
        (_no_model, "has no model file"),
        (_no_manifest, "is not a Core ML package"),
    ],
)
def test_damaged_packages(damaged: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(damaged)
    with pytest.raises(CheckpointError, match=words):
        Evaluator(read_package(damaged))


# --- programs that cannot be computed -----------------------------------------------------------


def test_an_unknown_operation_is_named(folder: Path) -> None:
    path = build(
        folder / "unknown.mlpackage",
        lambda mb, types, x: [mb.acos(x=x, name="angle")],
        {"x": ((2, 3), "fp32")},
    )
    assert check_program(read_package(path)) == ["main: acos angle: unknown operation"]
    with pytest.raises(UnsupportedError) as caught:
        Evaluator(read_package(path))
    assert caught.value.reasons == ["acos angle, function main"]


def test_a_negative_index_is_not_defined_from_ios_17_on(folder: Path) -> None:
    def function(mb: Any, types: Any, i: Any) -> Any:
        return [mb.gather(x=FLOATS, indices=i, axis=0, name="rows")]

    for opset in (16, 17):
        path = folder / f"gather{opset}.mlpackage"
        build(path, function, {"i": ((2,), "int32")}, opset)
        evaluator = Evaluator(read_package(path))
        beyond = {"i": np.array([4, 0], np.int32)}
        with pytest.raises(CheckpointError, match="gather rows cannot be computed"):
            evaluator.run(beyond)
        negative = {"i": np.array([-1, 0], np.int32)}
        if opset == 16:
            np.testing.assert_array_equal(evaluator.run(negative)["rows"], FLOATS[[-1, 0]])
        else:
            with pytest.raises(CheckpointError, match="gather rows has the negative index -1"):
                evaluator.run(negative)


def _changed(path: Path, change: Callable[[Any], None]) -> Path:
    """The package with its protobuf changed."""
    from coremltools.proto import Model_pb2

    file = path / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(model.SerializeToString())
    return path


def _operation(operations: Any, kind: str) -> Any:
    return next(operation for operation in operations if operation.type == kind)


def test_a_declared_type_that_does_not_fit(damaged: Path) -> None:
    def change(operations: Any) -> None:
        _operation(operations, "softmax").outputs[0].type.tensorType.dataType = 11

    _changed(damaged, change)
    words = r"main: softmax \w+: computes fp16, the program declares \w+ as fp32\[1, 1, 12\]"
    with pytest.raises(CheckpointError, match=words):
        Evaluator(read_package(damaged))


def test_a_declared_shape_that_does_not_fit(damaged: Path) -> None:
    def change(operations: Any) -> None:
        sizes = _operation(operations, "softmax").outputs[0].type.tensorType.dimensions
        sizes[2].constant.size = SLOTS + 1

    _changed(damaged, change)
    words = r"main: softmax \w+: computes float32\[1, 1, 12\], .* as fp16\[1, 1, 13\]"
    with pytest.raises(CheckpointError, match=words):
        steps(damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda inputs: inputs.pop("axis"), "the argument axis is missing"),
        (lambda inputs: inputs["other"].CopyFrom(inputs["x"]), "unknown argument other"),
    ],
)
def test_arguments_that_do_not_fit(damaged: Path, change: Any, words: str) -> None:
    _changed(damaged, lambda operations: change(_operation(operations, "concat").inputs))
    assert any(words in problem for problem in check_program(read_package(damaged)))


@pytest.mark.parametrize("kind", ["const", "softmax"])
@pytest.mark.parametrize("later", [False, True])
def test_a_value_that_nothing_makes(damaged: Path, kind: str, later: bool) -> None:
    """An operation is gone, or behind those that read it."""

    def change(operations: Any) -> None:
        moved = type(operations[0])()
        moved.CopyFrom(_operation(operations, kind))
        operations.remove(moved)
        if later:
            operations.append(moved)

    package = read_package(_changed(damaged, change))
    words = r"main: \w+ \w+ reads \w+, which nothing before it makes"
    assert re.fullmatch(words, check_program(package)[0])
    with pytest.raises(CheckpointError, match=words):
        Evaluator(package)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.block_specializations[f.opset].outputs.append("y"), "main computes no y"),
        (lambda f: setattr(f, "opset", "CoreML99"), "no operations for its CoreML99"),
    ],
)
def test_a_function_without_what_it_names(damaged: Path, change: Any, words: str) -> None:
    from coremltools.proto import Model_pb2

    file = damaged / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    change(model.mlProgram.functions["main"])
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=words):
        read_package(damaged)


def test_a_state_that_is_written_with_what_was_in_it(damaged: Path) -> None:
    def change(operations: Any) -> None:
        read = _operation(operations, "read_state")
        write = next(
            operation
            for operation in operations
            if operation.type == "write_state" and operation.inputs["input"] == read.inputs["input"]
        )
        write.inputs["data"].arguments[0].name = read.outputs[0].name

    _changed(damaged, change)
    (problem,) = check_program(read_package(damaged))
    assert problem.endswith("is written only with what was in it: the write was dropped")


# --- calls --------------------------------------------------------------------------------------


def test_calls_that_do_not_fit(right: Path) -> None:
    evaluator = Evaluator(read_package(right))
    ids, position = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    with pytest.raises(UsageError, match="main needs a value for position"):
        evaluator.run({"input_ids": ids}, evaluator.new_state())
    call = {"input_ids": ids, "position": position}
    with pytest.raises(UsageError, match="main has states: keys, values"):
        evaluator.run(call)
    with pytest.raises(UsageError, match="computes no value nothing"):
        evaluator.run(call, evaluator.new_state(), watch=["nothing"])
    with pytest.raises(UsageError, match="has no function prefill"):
        Evaluator(read_package(right), "prefill")


def test_a_call_that_fails_leaves_the_state_alone(right: Path) -> None:
    evaluator = Evaluator(read_package(right))
    state = evaluator.new_state()
    call = {"input_ids": np.array([[3]], np.int32), "position": np.array([0], np.int32)}
    evaluator.run(call, state)
    before = {name: value.copy() for name, value in state.items()}
    with pytest.raises(CheckpointError, match="slice_update"):
        evaluator.run({**call, "position": np.array([SLOTS], np.int32)}, state)
    assert all(np.array_equal(before[name], state[name]) for name in STATES)
    other = evaluator.copy_state(state)
    evaluator.run({**call, "position": np.array([1], np.int32)}, other)
    assert all(np.array_equal(before[name], state[name]) for name in STATES)
    assert not np.array_equal(before["keys"], other["keys"])


def test_watched_values(right: Path) -> None:
    package = read_package(right)
    softmax = next(op for op in package.function().operations if op.type == "softmax")
    evaluator = Evaluator(package)
    call = {"input_ids": np.array([[3]], np.int32), "position": np.array([0], np.int32)}
    found = evaluator.run(call, evaluator.new_state(), watch=[softmax.name, "input_ids"])
    assert set(found) == {"logits", softmax.name, "input_ids"}
    np.testing.assert_allclose(found[softmax.name][0, 0], [1] + [0] * (SLOTS - 1))
