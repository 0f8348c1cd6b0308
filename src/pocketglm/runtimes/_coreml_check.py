"""What can be seen to be wrong in a Core ML program without running it. Torch-free.

The converter writes some wrong programs without a word: types that do not fit, a cache that is
never written, a cache that is no state at all, token ids that became floats.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pocketglm.runtimes._coreml_file import Function, Operation, Package
from pocketglm.runtimes._coreml_ops import OPS
from pocketglm.runtimes._coreml_table import Op
from pocketglm.runtimes._coreml_values import Constant, TensorType

_INDEX_OPS = ("gather", "gather_nd", "gather_along_axis", "one_hot")
# Arguments whose values become the result's, in operations that move values.
_CONTENTS = ("x", "a", "b", "data", "input", "update", "updates", "values")


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a function by name: their declared types, and which are constants."""

    types: Mapping[str, TensorType]
    constants: Mapping[str, Constant]

    @classmethod
    def of(cls, function: Function) -> Values:
        """Those of a function."""
        types = {n: port.type for n, port in (*function.inputs.items(), *function.states.items())}
        constants = {}
        for operation in function.operations:
            types.update(operation.outputs)
            if operation.value is not None:
                constants[operation.name] = operation.value
        return cls(types, constants)

    def type(self, value: str | Constant) -> TensorType:
        """The declared type of an argument."""
        return value.type if isinstance(value, Constant) else self.types[value]

    def text(self, value: str | Constant) -> str | None:
        """The text that an argument names; None: it is no constant."""
        constant = value if isinstance(value, Constant) else self.constants.get(value)
        return None if constant is None else str(constant.read()[()])


def check_program(package: Package, states: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the programs of a package, one sentence each; [] if nothing is seen.

    states: the names that every function must have as states; None: those that any of them has.

    Seen are: values that nothing makes; operations that the evaluator does not know; types that do
    not fit (an operation's arguments and its declared outputs); a missing state; a state that is
    never written, or only with what was in it; float inputs that are used as token ids or
    positions. What remains is for the evaluator: shapes, and values.
    """
    functions = package.functions.values()
    wanted = {n for f in functions for n in f.states} if states is None else set(states)
    problems = []
    for function in functions:
        if missing := missing_values(function):
            problems += missing
            continue  # nothing else can be said of it
        values = Values.of(function)
        for operation in function.operations:
            problems += operation_problems(function, operation, values)
        for name in sorted(wanted - set(function.states)):
            problems.append(f"{function.name}: there is no state {name}: the cache is lost")
        problems += _state_problems(function)
        problems += _lost_cache_problems(function)
        problems += _index_problems(function)
    for name in sorted(wanted):
        types = {str(f.states[name].type) for f in functions if name in f.states}
        if len(types) > 1:
            problems.append(f"state {name} has different types: {', '.join(sorted(types))}")
    return problems


def missing_values(function: Function) -> list[str]:
    """Arguments and outputs that no operation makes, or only a later one."""
    made, problems = {*function.inputs, *function.states}, []
    for operation in function.operations:
        for names in operation.inputs.values():
            problems += [
                f"{function.name}: {operation.type} {operation.name} reads {name}, which nothing "
                "before it makes"
                for name in names
                if isinstance(name, str) and name not in made
            ]
        made.update(name for name, _ in operation.outputs)
    return problems


# --- types --------------------------------------------------------------------------------------


def operation_problems(function: Function, operation: Operation, values: Values) -> list[str]:
    """What is wrong with one operation: unknown, its arguments, the declared types."""
    if operation.value is not None:
        return []
    if operation.type not in OPS:
        return [f"{function.name}: {operation.type} {operation.name}: unknown operation"]
    op = OPS[operation.type]
    found = [
        *_argument_problems(op, operation),
        *_dtype_problems(op, operation, values),
        *_shape_problems(op, operation, values),
    ]
    return [f"{function.name}: {operation.type} {operation.name}: {words}" for words in found]


@functools.cache
def _parameters(op: Op) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the arguments: all, and those that must be given."""
    known = inspect.signature(op.run).parameters.values()
    return (
        frozenset(p.name for p in known),
        frozenset(p.name for p in known if p.default is inspect.Parameter.empty),
    )


def _argument_problems(op: Op, operation: Operation) -> Iterator[str]:
    known, needed = _parameters(op)
    given = set(operation.inputs)
    for name in sorted(given - known):
        yield f"unknown argument {name}"
    for name in sorted(needed - given):
        yield f"the argument {name} is missing"


def _dtype_problems(op: Op, operation: Operation, values: Values) -> Iterator[str]:
    kinds = {
        f"{name}": values.type(value).dtype
        for name in op.same
        for value in operation.inputs.get(name, ())
    }
    if len(set(kinds.values())) > 1:
        yield "arguments of different types: " + ", ".join(f"{n} {k}" for n, k in kinds.items())
    for number, (name, declared) in enumerate(operation.outputs):
        rule = op.out[min(number, len(op.out) - 1)]
        expected = _expected_dtype(rule, op, operation, values)
        if expected not in (None, declared.dtype):
            yield f"computes {expected}, the program declares {name} as {declared}"


def _expected_dtype(rule: str, op: Op, operation: Operation, values: Values) -> str | None:
    """None: the argument that decides is not given, or no constant."""
    if rule.startswith(":"):
        return rule[1:]
    given = operation.inputs.get(rule.removeprefix("="), ())
    if rule.startswith("="):
        if given:
            return values.text(given[0])
        default = inspect.signature(op.run).parameters[rule[1:]].default
        return str(default)
    return values.type(given[0]).dtype if given else None


def _shape_problems(op: Op, operation: Operation, values: Values) -> Iterator[str]:
    """Of element-wise operations: is the declared shape that of the arguments, broadcast?"""
    if not op.elementwise:
        return
    shapes = [
        values.type(value).shape
        for name in ("cond", *op.same)
        for value in operation.inputs.get(name, ())
    ]
    for name, declared in operation.outputs:
        expected = _broadcast(shapes)
        fits = len(expected) == len(declared.shape) and all(
            None in (a, b) or a == b for a, b in zip(expected, declared.shape, strict=True)
        )
        if not fits:
            computed = TensorType(declared.dtype, expected)
            yield f"computes {computed}, the program declares {name} as {declared}"


def _broadcast(shapes: list[tuple[int | None, ...]]) -> tuple[int | None, ...]:
    rank = max(len(shape) for shape in shapes)
    found: list[int | None] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        known = sizes - {None}
        found.append(known.pop() if len(known) == 1 else 1 if not sizes else None)
    return tuple(found)


# --- flow ---------------------------------------------------------------------------------------


def _sources(
    function: Function,
    start: Iterable[str | Constant],
    through: Iterable[str],
    arguments: Iterable[str] | None = None,
) -> set[str]:
    """Where values come from, by way of operations of the types `through`: inputs and states of the
    function, constants, and results of other operations.

    arguments: to follow; None: all.
    """
    makers = {name: op for op in function.operations for name, _ in op.outputs}
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [name for name in start if isinstance(name, str)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        maker = makers.get(name)
        if maker is None or maker.type not in through:
            found.add(name)
            continue
        for key, names in maker.inputs.items():
            if arguments is None or key in arguments:
                waiting += [n for n in names if isinstance(n, str)]
    return found


def _state_problems(function: Function) -> Iterator[str]:
    """A state that no operation writes, or only with what was read from it."""
    moves = [name for name, op in OPS.items() if op.moves]
    for state in function.states:
        sources: set[str] = set()
        for operation in function.operations:
            op = OPS.get(operation.type)
            if op is not None and op.writes and operation.inputs.get(op.writes) == (state,):
                data = [n for k, names in operation.inputs.items() if k != op.writes for n in names]
                sources |= _sources(function, data, moves, _CONTENTS)
        if sources <= {state}:
            how = "only with what was in it" if sources else "by no operation"
            yield f"{function.name}: the state {state} is written {how}: the write was dropped"


def _lost_cache_problems(function: Function) -> Iterator[str]:
    """Without its declaration as a state, a cache becomes a constant that each call begins with."""
    if function.states:
        return
    constants = {op.name for op in function.operations if op.value is not None}
    for operation in function.operations:
        if operation.type == "slice_update" and set(operation.inputs["x"]) <= constants:
            yield (
                f"{function.name}: {operation.type} {operation.name} writes into a constant, and "
                "the program has no state: what it writes is lost after the call"
            )


def _index_problems(function: Function) -> Iterator[str]:
    """Float inputs that become indices."""
    through = [name for name, op in OPS.items() if op.elementwise or op.moves or name == "cast"]
    through = [name for name in through if name not in _INDEX_OPS]
    told: set[str] = set()
    for operation in function.operations:
        if operation.type not in _INDEX_OPS:
            continue
        sources = _sources(function, operation.inputs.get("indices", ()), through)
        for name in sorted(sources & set(function.inputs) - told):
            declared = function.inputs[name].type
            if declared.dtype.startswith("fp"):
                told.add(name)
                yield (
                    f"{function.name}: the input {name} is {declared} and is used as indices "
                    f"({operation.type} {operation.name}): fp16 cannot hold every number above "
                    "2048; declare it as int32"
                )
