"""The plan of a compression: YAML, `steps:` with one-key mappings `method: {settings}`.

seed: 0            # optional
steps:
  - quantize_rtn: {bits: 8, embeddings: 8}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pocketglm import registry
from pocketglm.contracts import Config, Method
from pocketglm.errors import PlanError, nearest


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One method with its checked settings."""

    method: str
    config: Config

    @property
    def spec(self) -> Method:
        spec: Method = registry.load("methods", self.method)
        return spec

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON values."""
        return self.config.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order; `seed` is for methods that draw random numbers."""

    steps: tuple[PlanStep, ...]
    seed: int | None = None

    @classmethod
    def from_file(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: with file and line: not YAML, unknown or repeated key, unknown method or
                setting (and the nearest name), a wrong value, no steps.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read: {error}", "check the path of --plan") from (
                error
            )
        return cls.from_text(text, path)

    @classmethod
    def from_text(cls, text: str, path: Path | None = None) -> Plan:
        """As `from_file`; `path` is for messages."""
        return _Reader(path).plan(text)

    @classmethod
    def single(cls, method: str, settings: Mapping[str, Any] | None = None) -> Plan:
        """A plan of one step; text values are read as YAML ('8' is a number).

        Raises:
            PlanError: unknown method or setting, or a wrong value.
        """
        values = {}
        for key, value in (settings or {}).items():
            try:
                values[key] = yaml.safe_load(value) if isinstance(value, str) else value
            except yaml.YAMLError as error:
                raise PlanError(
                    f"--set {key}={value}: the value is not YAML", "quote special characters"
                ) from error
        return cls((_Reader(None).step(method, values, {}),))

    def describe(self) -> dict[str, Any]:
        """The plan as a JSON value; equal plans give equal values."""
        return {"seed": self.seed, "steps": [{s.method: s.settings} for s in self.steps]}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns YAML nodes, which know their line, into a plan."""

    path: Path | None

    def plan(self, text: str) -> Plan:
        try:
            root = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            raise self._error(f"not YAML: {error.problem}", "check the indentation", line) from (
                error
            )
        if root is None:
            raise self._error("the plan is empty", "add `steps:` with at least one method", 1)
        entries = self._mapping(root, "the plan")
        for key, (line, _) in entries.items():
            if key not in ("steps", "seed"):
                raise self._error(f"unknown key '{key}'", nearest(key, ("steps", "seed")), line)
        if "steps" not in entries:
            raise self._error("the plan has no `steps:`", "list the methods there", 1)
        line, node = entries["steps"]
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._error("`steps:` should be a list of methods", "- quantize_rtn: {}", line)
        steps = tuple(self._step(item) for item in node.value)
        return Plan(steps, self._seed(*entries["seed"]) if "seed" in entries else None)

    def _seed(self, line: int, node: yaml.Node) -> int:
        value = _value(node)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._error(f"seed should be a whole number, it is {value!r}", "seed: 0", line)
        return value

    def _step(self, node: yaml.Node) -> PlanStep:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            raise self._error(f"'{node.value}' has no settings", f"- {node.value}: {{}}", line)
        entries = self._mapping(node, "a step")
        if len(entries) != 1:
            raise self._error(
                f"a step is one method, this one has {len(entries)} keys: {', '.join(entries)}",
                "begin each method with '- ', and indent its settings below it",
                line,
            )
        method, (line, settings) = next(iter(entries.items()))
        lines = {"": line}
        values: Any = _value(settings)
        if values is None:
            values = {}
        else:
            pairs = self._mapping(settings, f"the settings of {method}")
            lines |= {key: number for key, (number, _) in pairs.items()}
        return self.step(method, values, lines)

    def step(self, method: str, settings: dict[str, Any], lines: dict[str, int]) -> PlanStep:
        """A checked step; `lines` tells where each setting, and "" the method, is written."""
        known = registry.names("methods")
        if method not in known:
            raise self._error(
                f"unknown method '{method}'", nearest(method, known), lines.get("", 0)
            )
        fields = registry.load("methods", method).config
        try:
            return PlanStep(method, fields.model_validate(settings))
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            line = lines.get(key, lines.get("", 0))
            if first["type"] == "extra_forbidden":
                raise self._error(
                    f"{method} has no setting '{key}'", nearest(key, fields.model_fields), line
                ) from error
            where = ".".join([method, *map(str, first["loc"])])
            raise self._error(
                f"{where} = {first['input']!r}: {first['msg']}", "correct the value", line
            ) from error

    def _mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[int, yaml.Node]]:
        """Keys with their line and value."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise self._error(
                f"{what} should be a mapping `key: value`", "steps: [{quantize_rtn: {}}]", line
            )
        entries: dict[str, tuple[int, yaml.Node]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(_value(key))
            if name in entries:
                raise self._error(
                    f"'{name}' is given twice (first in line {entries[name][0]})", "keep one", line
                )
            entries[name] = (line, value)
        return entries

    def _error(self, message: str, hint: str, line: int) -> PlanError:
        return PlanError(message, hint, path=self.path, line=line)


def _value(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_object(node, deep=True)
