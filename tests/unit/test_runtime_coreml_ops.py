"""Each operation of the Core ML evaluator against torch, through a saved package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coreml_cases
import numpy as np
import pytest
import torch

from pocketglm.runtimes._coreml_check import check_program
from pocketglm.runtimes._coreml_eval import Evaluator, Precision
from pocketglm.runtimes._coreml_file import read_package
from pocketglm.runtimes._coreml_ops import OPS

pytest.importorskip("coremltools")

CASES = {case.name: case for case in coreml_cases.CASES}
OPSETS = sorted({case.opset for case in CASES.values()})
STATES = {"read_state", "write_state"}  # tested with programs that have states
# (relative, absolute). Results that differ in float32's last bits may be rounded to neighbours in
# fp16: one step, 2^-10.
TOLERANCES = {"float32": (2e-6, 2e-6), "float16": (2**-10, 1e-6)}
Results = dict[str, Any]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """All cases of an opset in one program, which the MIL builder makes and coremltools saves."""
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    for opset in OPSETS:
        for precision in TOLERANCES:
            found[opset, precision] = folder / f"{opset}-{precision}.mlpackage"
            save(found[opset, precision], opset, precision)
    return found


def save(path: Path, opset: int, precision: str) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    version = getattr(ct.target, f"iOS{opset}")
    kind, scalar = (types.fp16, np.float16) if precision == "float16" else (types.fp32, np.float32)
    cases = [case for case in CASES.values() if case.opset == opset]
    inputs = {
        name: Builder.placeholder(value.shape, kind if value.dtype.kind == "f" else types.int32)
        for name, value in feeds(opset).items()
    }
    with Function(inputs, opset_version=version) as function:
        outputs = []
        for number, case in enumerate(cases):
            values = []
            for place, value in enumerate(case.inputs):
                given = function.inputs[f"in_{number}_{place}"]
                values.append(Builder.cast(x=given, dtype="bool") if value.dtype == bool else given)
            result = case.build(Builder, scalar, *values, *([types] if weights(case) else []))
            if result.dtype not in (types.fp16, types.fp32, types.int32):
                result = Builder.cast(x=result, dtype="int32")
            outputs.append(Builder.identity(x=result, name=f"out_{number}"))
        function.set_outputs(outputs)
    program = Program()
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=version,
        compute_precision=ct.precision.FLOAT32,  # as the builder made it
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))


def weights(case: Any) -> bool:
    return bool(case.op.startswith("constexpr_"))


def feeds(opset: int) -> dict[str, Any]:
    cases = [case for case in CASES.values() if case.opset == opset]
    return {
        f"in_{number}_{place}": value.astype(np.int32) if value.dtype == bool else value
        for number, case in enumerate(cases)
        for place, value in enumerate(case.inputs)
    }


@pytest.fixture(scope="module")
def results(packages: dict[tuple[int, str], Path]) -> dict[str, Results]:
    """Precision -> case -> what the evaluator computes."""
    found: dict[str, Results] = {precision: {} for precision in TOLERANCES}
    for (opset, precision), path in packages.items():
        chosen: Precision = "float16" if precision == "float16" else "float32"
        outputs = Evaluator(read_package(path), precision=chosen).run(feeds(opset))
        names = [case.name for case in CASES.values() if case.opset == opset]
        found[precision].update({n: outputs[f"out_{i}"] for i, n in enumerate(names)})
    return found


def test_every_operation_has_a_case() -> None:
    assert {case.op for case in CASES.values()} | STATES == set(OPS)


def test_nothing_is_wrong_with_these_programs(packages: dict[tuple[int, str], Path]) -> None:
    for path in packages.values():
        assert check_program(read_package(path)) == []


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("name", list(CASES))
def test_operation_against_torch(name: str, precision: str, results: dict[str, Results]) -> None:
    case, found = CASES[name], results[precision][name]
    given = [torch.tensor(value) for value in case.inputs]
    if precision == "float16":
        given = [v.half().float() if v.is_floating_point() else v for v in given]
    expected = case.expected(*given)
    assert list(found.shape) == list(expected.shape)
    if not expected.is_floating_point():
        np.testing.assert_array_equal(found, expected.to(torch.int32).numpy())
        return
    wanted = expected.float()
    if precision == "float16":
        wanted = wanted.half().float()
        np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
    relative, absolute = TOLERANCES[precision]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=relative, atol=absolute)
