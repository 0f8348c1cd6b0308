"""Computes a saved Core ML program in numpy: the reference where Core ML itself cannot run.

Every value is float32 or an integer in memory. In the precision `float16` each result that the
program declares as fp16 is rounded to it, as if every operation were computed in float32 and
stored in half; Core ML itself may accumulate and fuse otherwise. In `float32` nothing is rounded
but what the file stores. Every result's shape and type is compared with the program. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketglm.errors import CheckpointError, UnsupportedError, UsageError
from pocketglm.runtimes._coreml_check import Values, missing_values, operation_problems
from pocketglm.runtimes._coreml_file import Operation, Package, Port
from pocketglm.runtimes._coreml_ops import OPS
from pocketglm.runtimes._coreml_table import Op
from pocketglm.runtimes._coreml_values import Constant, TensorType, numpy_dtype

Array = npt.NDArray[Any]
State = dict[str, Array]
Precision = Literal["float16", "float32"]
_LISTS = ("values",)  # arguments that are lists even where they hold one value


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation to run. fixed: its constant arguments. open: names of the others.

    last: values that no later step needs.
    """

    operation: Operation
    op: Op
    fixed: Mapping[str, Any]
    open: Mapping[str, tuple[str, ...]]
    last: tuple[str, ...]


class Evaluator:
    """One function of a package, ready to run; weights are decoded once, when it is opened.

    Raises:
        UnsupportedError: the function has an operation that is not in the table.
        CheckpointError: the declared types do not fit together, or weight.bin is damaged.
        UsageError: the package has no such function.
    """

    def __init__(
        self, package: Package, function: str | None = None, precision: Precision = "float32"
    ) -> None:
        self.function = package.function(function)
        self.inputs, self.outputs = self.function.inputs, self.function.outputs
        self.states = self.function.states
        self._half = precision == "float16"
        self._shared = package.shared
        self._check()
        self._constants: dict[str, Any] = {}
        self._steps: list[_Step] = []
        for operation in self.function.operations:
            self._add(operation)
        self._release()

    def new_state(self) -> State:
        """Every state's first value: zeros."""
        return {
            name: np.zeros(tuple(size or 1 for size in port.type.shape), _kind(port.type))
            for name, port in self.states.items()
        }

    def copy_state(self, state: State) -> State:
        """Another state with the same values: a run replaces arrays, it changes none."""
        return dict(state)

    def run(
        self, inputs: Mapping[str, Any], state: State | None = None, watch: Iterable[str] = ()
    ) -> dict[str, Array]:
        """The outputs, and the values named in `watch`; floats are float32.

        state: its arrays are replaced by new ones, never changed, so a shallow copy of it keeps
        what was; if the run fails nothing is replaced.

        Raises:
            UsageError: an input or state is missing, unknown, or of another shape or type.
            CheckpointError: an operation failed, or gave another shape than the program declares.
        """
        values: dict[str, Array] = {**self._taken(inputs), **self._states(state)}
        watched = {name: self._constants[name] for name in watch if name in self._constants}
        names = set(watch) - set(watched)
        watched.update({name: values[name] for name in names if name in values})
        with np.errstate(all="ignore"):
            for step in self._steps:
                results = self._run(step, values)
                values.update(results)
                watched.update({n: v for n, v in results.items() if n in names})
                for name in step.last:
                    values.pop(name, None)
        if missing := sorted(names - set(watched)):
            raise UsageError(
                f"{self.function.name} computes no value {missing[0]}", "see the program's names"
            )
        if state is not None:
            state.update({name: values[name] for name in self.states})
        found = {n: self._constants[n] if n in self._constants else values[n] for n in self.outputs}
        return {**found, **watched}

    # --- opening ---------------------------------------------------------------------------------

    def _check(self) -> None:
        """Are all operations known, and do the declared types fit?"""
        function = self.function
        if missing := missing_values(function):
            raise CheckpointError(missing[0], _REPORT)
        unknown = sorted(
            f"{op.type} {op.name}, function {function.name}"
            for op in function.operations
            if op.value is None and op.type not in OPS
        )
        if unknown:
            raise UnsupportedError(
                "the program has operations that the evaluator does not know",
                unknown,
                "run the package on a Mac or a phone; the known ones are in docs/coreml-ops.md",
            )
        self._program = Values.of(function)
        for operation in function.operations:
            for problem in operation_problems(function, operation, self._program):
                raise CheckpointError(problem, "Core ML would refuse or misread this program")

    def _add(self, operation: Operation) -> None:
        if operation.value is not None:
            self._constants[operation.name] = self._constant(operation.value)
            return
        op = OPS[operation.type]
        fixed: dict[str, Any] = {}
        open_: dict[str, tuple[str, ...]] = {}
        for key, values in operation.inputs.items():
            if all(isinstance(v, Constant) or v in self._constants for v in values):
                found = [self._argument(v) for v in values]
                fixed[key] = found if key in _LISTS else found[0]
            else:
                open_[key] = tuple(v for v in values if isinstance(v, str))
        step = _Step(operation, op, fixed, open_, ())
        if operation.type.startswith("constexpr_"):
            name = operation.name
            self._constants[name] = self._once(
                _identity(operation, self._program.constants),
                lambda: self._run(step, {})[name],
            )
        else:
            self._steps.append(step)

    def _argument(self, value: str | Constant) -> Any:
        return self._constant(value) if isinstance(value, Constant) else self._constants[value]

    def _constant(self, constant: Constant) -> Any:
        """As operations take it: floats in float32, text as str."""
        if constant.type.dtype == "string":
            return str(constant.read()[()])
        return self._once(constant.key, lambda: _floats(constant.read()))

    def _once(self, key: Any, make: Callable[[], Array]) -> Array:
        """A decoded constant, shared with other open evaluators of the package."""
        if key is None:
            return make()
        found: Array | None = self._shared.get((self._half, key))
        if found is None:
            found = make()
            self._shared[(self._half, key)] = found
        return found

    def _release(self) -> None:
        """Note after which step each value is not needed any more; drop constants nobody needs."""
        needed = {*self.outputs, *self.states}
        steps = []
        for step in reversed(self._steps):
            used = {name for names in step.open.values() for name in names}
            made = {name for name, _ in step.operation.outputs}
            last = tuple(sorted((used | made) - needed))
            needed |= used
            steps.append(_Step(step.operation, step.op, step.fixed, step.open, last))
        self._steps = steps[::-1]
        self._constants = {n: v for n, v in self._constants.items() if n in needed}

    # --- running ---------------------------------------------------------------------------------

    def _run(self, step: _Step, values: Mapping[str, Array]) -> dict[str, Array]:
        """One operation: its outputs, and the state that it writes."""
        arguments = dict(step.fixed)
        for key, names in step.open.items():
            found = [values[n] if n in values else self._constants[n] for n in names]
            arguments[key] = found if key in _LISTS else found[0]
        self._check_indices(step, arguments)
        try:
            result = step.op.run(**arguments)
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self._at(step.operation)} cannot be computed: {error}", _REPORT
            ) from error
        results = result if isinstance(result, list) else [result]
        if step.op.writes:
            state = step.operation.inputs[step.op.writes][0]
            return {
                name: self._declared(step, name, type_, results[0])
                for name, type_ in (
                    *step.operation.outputs,
                    *([(state, self._program.types[state])] if isinstance(state, str) else []),
                )
            }
        if len(results) != len(step.operation.outputs):
            raise CheckpointError(
                f"{self._at(step.operation)} has {len(step.operation.outputs)} outputs, "
                f"{len(results)} were computed",
                _REPORT,
            )
        return {
            name: self._declared(step, name, type_, value)
            for (name, type_), value in zip(step.operation.outputs, results, strict=True)
        }

    def _declared(self, step: _Step, name: str, declared: TensorType, value: Any) -> Array:
        """A result, compared with its declared type, and rounded to it."""
        array = np.asarray(value)
        kind = _kind(declared)
        if array.dtype.kind.replace("u", "i") != kind.kind.replace("u", "i") or not declared.holds(
            array.shape
        ):
            computed = f"{array.dtype}{list(array.shape)}"
            raise CheckpointError(
                f"{self._at(step.operation)}: computes {computed}, the program declares {name} as "
                f"{declared}",
                _REPORT,
            )
        if self._half and declared.dtype == "fp16" and not step.op.moves:
            array = array.astype(np.float16)
        return array.astype(kind, copy=False)

    def _check_indices(self, step: _Step, arguments: Mapping[str, Any]) -> None:
        """From iOS 17 on, what a negative index reads or writes is not defined."""
        if self.function.opset in _NEGATIVE_ALLOWED or step.operation.type == "one_hot":
            return
        indices = arguments.get("indices")
        if isinstance(indices, np.ndarray) and indices.size and np.min(indices) < 0:
            raise CheckpointError(
                f"{self._at(step.operation)} has the negative index {indices.min()}, which the "
                f"operations of {self.function.opset} do not define",
                "check the inputs; the program must add the axis's size to a negative index",
            )

    def _at(self, operation: Operation) -> str:
        return f"{self.function.name}: {operation.type} {operation.name}"

    def _taken(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The inputs in their declared types."""
        return {name: self._port(inputs, name, port) for name, port in self.inputs.items()}

    def _states(self, state: State | None) -> dict[str, Array]:
        if self.states and state is None:
            raise UsageError(
                f"{self.function.name} has states: {', '.join(self.states)}", "use new_state()"
            )
        return {name: self._port(state or {}, name, port) for name, port in self.states.items()}

    def _port(self, given: Mapping[str, Any], name: str, port: Port) -> Array:
        if name not in given:
            raise UsageError(
                f"{self.function.name} needs a value for {name}", f"give one of type {port.type}"
            )
        array = np.asarray(given[name])
        kind = _kind(port.type)
        fits = array.dtype.kind in (
            "biu" if kind.kind in "iu" else "f" if kind.kind == "f" else "b"
        )
        if not fits or not port.takes(array.shape):
            raise UsageError(
                f"{name} is {array.dtype}{list(array.shape)}, {self.function.name} takes "
                f"{port.type}{_choices(port)}",
                "use the types and shapes of the program's inputs",
            )
        if self._half and port.type.dtype == "fp16" and name in self.inputs:
            array = array.astype(np.float16)
        return array.astype(kind, copy=False)


_REPORT = "the file is damaged, or the converter wrote a wrong program: export it again"
_NEGATIVE_ALLOWED = ("CoreML5", "CoreML6")


def _kind(declared: TensorType) -> np.dtype[Any]:
    """The type that holds a declared type while a program runs."""
    kind = numpy_dtype(declared.dtype)
    return np.dtype(np.float32) if kind.kind == "f" else kind


def _floats(values: Array) -> Array:
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _identity(operation: Operation, constants: Mapping[str, Constant]) -> Any:
    """Equal for two constexpr operations that read the same bytes; None: one reads a result of
    another.
    """
    parts: list[Any] = [operation.type, str(operation.outputs[0][1])]
    for key, values in operation.inputs.items():
        value = constants.get(values[0]) if isinstance(values[0], str) else values[0]
        if value is None:
            return None
        parts.append((key, value.key or value.message.SerializeToString(deterministic=True)))
    return tuple(parts)


def _choices(port: Port) -> str:
    if port.shapes:
        return " of shape " + " or ".join(str(list(shape)) for shape in port.shapes)
    if port.ranges:
        sizes = (f"{low}..{'' if high is None else high}" for low, high in port.ranges)
        return f" with sizes {', '.join(sizes)}"
    return ""
