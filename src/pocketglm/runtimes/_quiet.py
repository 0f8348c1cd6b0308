"""Keeps other libraries from writing to stderr. Torch-free."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_kept: list[bool] = []


def keep_output() -> None:
    """From now on nothing of this module has an effect: stderr goes into a log, which is shown if
    the process crashes, and must then have all that was printed.
    """
    _kept.append(True)


@contextmanager
def silence() -> Iterator[None]:
    """Meanwhile nothing reaches the process's stderr.

    For libraries that name there what they look for, such as LiteRT its accelerators, and have no
    option against it.
    """
    if _kept:
        yield
        return
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
    if _kept:
        yield
        return
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
