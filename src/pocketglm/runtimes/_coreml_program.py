"""One function of a Core ML package, open: in Core ML on a Mac, elsewhere in the evaluator.

Core ML's side is written by coremltools' documentation; it has not been run. Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketglm.errors import CheckpointError, require
from pocketglm.runtimes._coreml_eval import Evaluator
from pocketglm.runtimes._coreml_file import Package, Port
from pocketglm.runtimes._quiet import silence

Array = npt.NDArray[Any]


class OpenFunction(Protocol):
    """What the sessions need of an open function; a state is a value that only it looks into."""

    @property
    def inputs(self) -> Mapping[str, Port]: ...
    @property
    def outputs(self) -> Mapping[str, Port]: ...
    @property
    def states(self) -> Mapping[str, Port]: ...

    def new_state(self) -> Any:
        """Zeros for every state."""

    def copy_state(self, state: Any) -> Any:
        """Another state with the same values."""

    def run(self, inputs: Mapping[str, Any], state: Any = None) -> dict[str, Array]:
        """The outputs, floats as float32; the state is written."""


def runs_here() -> bool:
    """Is this a system that has Core ML?"""
    return sys.platform == "darwin"


def open_function(package: Package, name: str, *, half: bool) -> OpenFunction:
    """Open a function. half: the evaluator rounds to fp16 what the program declares as fp16.

    Raises:
        MissingExtraError: on a Mac, coremltools is not installed.
        CheckpointError: Core ML cannot load the package, or its program is wrong.
        UnsupportedError: the evaluator does not know an operation of it.
    """
    if runs_here():
        return CoreMLFunction(package, name)
    return Evaluator(package, name, "float16" if half else "float32")


class CoreMLFunction:
    """A function in Core ML, on the compute units that it chooses itself.

    That a state which one function made may be given to another of the package is assumed.
    """

    def __init__(self, package: Package, name: str) -> None:
        function = package.function(name)
        self.inputs, self.outputs = function.inputs, function.outputs
        self.states = function.states
        with silence():  # it names there what it was not tested with
            tools = require("coremltools", extra="coreml")
        chosen = name if len(package.functions) > 1 else None
        try:
            self._model = tools.models.MLModel(str(package.path), function_name=chosen)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"Core ML cannot open {package.path}: {error}",
                "see the minimum macOS version in export.json, or export the checkpoint again",
            ) from error

    def new_state(self) -> Any:
        """Core ML's state object; None if the function has no state."""
        return self._model.make_state() if self.states else None

    def copy_state(self, state: Any) -> Any:
        """Another state object with the same values."""
        other = self.new_state()
        for name in self.states:
            other.write_state(name, state.read_state(name))
        return other

    def run(self, inputs: Mapping[str, Any], state: Any = None) -> dict[str, Array]:
        """The outputs by name."""
        found = self._model.predict(dict(inputs), *([state] if self.states else []))
        return {
            name: np.asarray(value, np.float32 if port.type.dtype.startswith("fp") else None)
            for name, port in self.outputs.items()
            for value in [found[name]]
        }
