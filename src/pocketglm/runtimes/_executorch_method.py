"""An open .pte file's method, with numpy around it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import Floats
from pocketglm.errors import CheckpointError, require
from pocketglm.runtimes._quiet import quiet

_METHOD = "forward"


def packages() -> tuple[ModuleType, ModuleType]:
    """PyTorch and ExecuTorch's runtime.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    torch = require("torch", extra="executorch")
    with quiet():  # it names what it reads about the processor, and its kernels
        runtime = require("executorch.runtime", extra="executorch")
        require("executorch.kernels.quantized", extra="executorch")  # embeddings of integers
    return torch, runtime


class Method:
    """The method `forward`: one output.

    Raises:
        MissingExtraError: executorch is not installed.
        CheckpointError: ExecuTorch cannot open the file.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self._torch, runtime = packages()
        with quiet():
            _set_threads(threads)
            try:
                self._program: Any = runtime.Runtime.get().load_program(file)
                self._method: Any = self._program.load_method(_METHOD)
            except (RuntimeError, KeyError) as error:
                raise CheckpointError(
                    f"ExecuTorch cannot open {file}: {str(error).splitlines()[0]}",
                    "copy the folder again, or export the checkpoint again",
                ) from error

    def __call__(self, *inputs: npt.NDArray[np.int64]) -> Floats:
        """int64 arrays -> float32."""
        tensors = [self._torch.from_numpy(np.ascontiguousarray(x, np.int64)) for x in inputs]
        found: Floats = self._method.execute(tensors)[0].numpy()
        return found


def _set_threads(count: int) -> None:
    """For all open files: ExecuTorch has one pool of threads in a process."""
    library = require("executorch.extension.pybindings.portable_lib", extra="executorch")
    if library._threadpool_get_thread_count() != count:
        library._unsafe_reset_threadpool(count)
