"""`pocketglm VERB ...`: finds the verb's file, runs it, turns errors into exit codes.

A verb is `cli/VERB.py` with `SPEC = function`; its help line is the first line of that file's
docstring, read without importing it, so `pocketglm --help` loads neither torch nor a runtime.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

from pocketglm import __version__, registry
from pocketglm.artifacts import digests
from pocketglm.errors import (
    FinishedElsewhereError,
    PocketError,
    UsageError,
    as_lines,
    explained,
    to_json,
)

_HERE = Path(__file__).parent
_DIGESTING = ("compress", "export")  # verbs that take the sha256 of a checkpoint, and import torch
_USAGE = """\
PocketGLM makes a language model fit a phone, and proves what that cost.

Usage: pocketglm VERB [OPTIONS]

Verbs:
{verbs}

Options:
  --help      This text; `pocketglm VERB --help` explains a verb.
  --version   The version.
  --debug     With any verb: show the traceback of an error.

Exit codes: 0 ok, 1 a gate or parity failed, 2 bad usage or input, 3 an optional package is
missing, 4 the work could not be done, 130 interrupted.
"""


def help_line(verb: str) -> str:
    """First line of a verb's module docstring, without importing the module."""
    tree = ast.parse((_HERE / f"{verb}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def usage() -> str:
    """The text of `pocketglm --help`."""
    verbs = registry.names("cli")
    width = max(map(len, verbs))
    return _USAGE.format(verbs="\n".join(f"  {v:<{width}}  {help_line(v)}" for v in verbs))


def command(verb: str) -> typer.Typer:
    """The Typer application of one verb."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name=verb, no_args_is_help=False)(registry.load("cli", verb))
    return app


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point; always ends with SystemExit."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Waiting OpenMP threads sleep: where other programs share the cores, spinning ones keep them
    # from the threads that are waited for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in args
    if debug:  # what processes that crashed have printed, too
        logging.basicConfig(format="%(message)s")
        logging.getLogger("pocketglm").setLevel(logging.DEBUG)
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        print(f"pocketglm {__version__}")
        sys.exit(0)
    if args[0] in _DIGESTING:
        _begin_digest(args[1:])
    try:
        try:
            code = _run(args)
        except FinishedElsewhereError:
            if os.environ.get("WORLD_SIZE", "1") != "1":  # the other processes are past this point
                raise
            code = _run(args)  # finds it done
    except KeyboardInterrupt:  # while the verb's modules load, before Typer listens
        code = 130
    except Exception as error:
        if debug:
            raise
        _fail(_explain(error, args[0]), "--json" in args)
    if code == 130:  # Ctrl-C, as Typer ends it
        sys.stderr.write("\ninterrupted; the same command resumes where it can\n")
    sys.exit(code or 0)


def _begin_digest(args: list[str]) -> None:
    """Digest the first folder of weights among the arguments while the verb is imported."""
    for arg in args:
        if arg and os.path.isdir(arg) and any(Path(arg).glob("*.safetensors")):
            digests.begin(Path(arg))
            return


def _run(args: list[str]) -> int | None:
    code: int | None = command(args[0])(
        args=args[1:], prog_name=f"pocketglm {args[0]}", standalone_mode=False
    )
    return code


def _explain(error: Exception, verb: str) -> PocketError:
    """Any error as one of ours."""
    if isinstance(error, typer.TyperException):
        return UsageError(_with_value(error), f"pocketglm {verb} --help")
    return explained(error)


def _with_value(error: typer.TyperException) -> str:
    """The message with the value that it is about, which Typer leaves out of ranges and numbers."""
    message: str = error.format_message()
    cause = error.__cause__
    if isinstance(cause, ValueError) and hasattr(cause, "errors"):  # pydantic's, slow to import
        value = f"'{cause.errors()[0]['input']}'"
        return message if value in message else f"{message}, got {value}"
    return message


def _fail(error: PocketError, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": to_json(error)}, ensure_ascii=False))
    sys.stderr.write(as_lines(error.message, error.hint))
    sys.stderr.flush()
    sys.exit(error.exit_code)
