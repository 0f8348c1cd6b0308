"""Keeps other libraries from writing to stderr. Torch-free."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence() -> Iterator[None]:
    """Meanwhile nothing reaches the process's stderr.

    For libraries that name there what they look for, such as LiteRT its accelerators, and have no
    option against it.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def quiet() -> Iterator[None]:
    """`silence`, and Python's warnings and log lines below errors stay away too."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
