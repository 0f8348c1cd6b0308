"""The `--json` results: one class per verb, each with a JSON schema that its output obeys."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from pocketglm import registry
from pocketglm.artifacts.schemas import RESULTS, EvalResult, MetricResult

# What `schema` prints is itself a schema, so it has no class.
WITHOUT = {"schema"}


def example(kind: Any) -> Any:
    """A value of an annotation: the smallest that is not empty."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {
            name: example(field.annotation)
            for name, field in kind.model_fields.items()
            if not (kind.__name__ == "Claim" and name in ("baseline", "candidate"))
        }
    if origin is list:
        return [example(args[0])]
    if origin is dict:
        return {"key": example(args[1])}
    if origin is Literal:
        return args[0]
    if args:  # a union
        return example(args[0])
    return {str: "text", int: 1, float: 0.5, bool: True, Any: "anything"}[kind]


@pytest.mark.parametrize("verb", RESULTS)
def test_every_result_survives_its_json(verb: str) -> None:
    kind = RESULTS[verb]
    value = kind.model_validate(example(kind))
    line = value.model_dump_json()
    assert "\n" not in line
    assert kind.model_validate_json(line) == value


@pytest.mark.parametrize("verb", RESULTS)
def test_every_result_has_a_closed_schema(verb: str) -> None:
    schema = json.loads(json.dumps(RESULTS[verb].model_json_schema()))
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(RESULTS[verb].model_fields)


def test_every_verb_has_a_result() -> None:
    assert set(registry.names("cli")) - WITHOUT <= set(RESULTS)


def test_an_unknown_field_is_an_error() -> None:
    metric = MetricResult(value=0.9, n=10, low=0.8, high=0.95)
    fields: dict[str, Any] = {
        "path": "p",
        "task": "intent",
        "data": "d",
        "split": "test",
        "primary": "accuracy",
        "metrics": {"accuracy": metric},
    }
    assert EvalResult(**fields).metrics["accuracy"].n == 10
    with pytest.raises(ValidationError, match="acuracy"):
        EvalResult(**fields, acuracy=1)  # type: ignore[call-arg]
