"""Print the JSON schema of what a verb prints with --json."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pocketglm.artifacts.schemas import RESULTS
from pocketglm.errors import UsageError, nearest


def schema(verb: Annotated[str, typer.Argument(help="A verb, e.g. eval.")]) -> None:
    """Print the JSON schema of what VERB prints with --json."""
    if verb not in RESULTS:
        raise UsageError(f"no --json schema for '{verb}'", nearest(verb, RESULTS))
    print(json.dumps(RESULTS[verb].model_json_schema(), indent=2))


SPEC = schema
