"""How an operation of a Core ML program is described to the evaluator. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    run: takes the arguments under their names in the program; floats are float32 arrays, lists of
    values are lists, strings are str. Its defaults are the operation's.
    out: the type of each output: the name of the argument whose type it has, `:int32` a fixed one,
    `=dtype` the one that the argument `dtype` names.
    same: arguments that must have one type. elementwise: the output's shape is that of the
    arguments `same`, and `cond`, broadcast. moves: it computes nothing, so nothing is rounded.
    writes: the argument that names the state which the result becomes.
    """

    run: Run
    about: str
    out: tuple[str, ...] = ("x",)
    same: tuple[str, ...] = ()
    elementwise: bool = False
    moves: bool = False
    writes: str = ""


Table = dict[str, Op]


def definer(table: Table) -> Callable[..., Callable[[Run], Run]]:
    """A decorator that puts a function into `table` under its own name, without a final `_`."""

    def define(*out: str, **options: Any) -> Callable[[Run], Run]:
        def put(run: Run) -> Run:
            about = (run.__doc__ or "").strip().splitlines()[0].rstrip(".")
            table[run.__name__.rstrip("_")] = Op(run, about, out or ("x",), **options)
            return run

        return put

    return define
