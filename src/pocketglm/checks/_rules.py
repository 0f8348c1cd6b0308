"""The rules of a delegate: which operators it takes. Data, in `checks/rules/DELEGATE.yaml`.

    title: XNNPACK in LiteRT
    target: litert                 whose graphs it judges
    runs_on: cpu                   or gpu, npu
    lowered: false                 it needs a file of its own, which the target does not write
    evidence: source               how its rules are known, unless one says otherwise
    source: code                   a key of `sources`, likewise
    where: {os: [android]}         the devices that have it, see `_devices.py`
    every: [...]                   needs of every operator
    plain: [RELU, ...]             the operators that it takes as they are
    ops: {ADD: [...], ...}         the others that it knows, with their needs
    rewrites: {CUMSUM: ...}        what to do about those that it does not know
    unpacks: {DEQUANTIZE: {...}}   operators that it runs once, at loading, if all that read it are
                                   taken
    follows: {quantize: [linear]}  operators that it takes if one of these reads them and is taken
    partitions: merged             how its pieces are formed, see `_partitions.py`
    keepers: [linear]              of merged ones: operators whose constants stay with the first one

A need is `{if: {...}, need: {...} or [{...}, ...], because: ..., rewrite: ...}`: where the facts of
a node are as `if` says, they must be as `need` says (one of them). A fact is

    in0.dtype, ins.rank, out0.dim-1    of an input, of all inputs, of an output: dtype, rank, dimN,
                                       static (all sizes known), elements, constant, scales, block
    in1.maker, in1.of_constant         the operator that makes it ('': none); if it reads a constant
    out0.readers, out0.reader          how many operators read it; which
    operands.dtype                     of the inputs that are no constants
    attr.axis, version, inputs         of the operator; inputs: how many it has
    device.api                         of the device

and is compared with one value, a list of which it must be one, or `{min:, max:, multiple:}`. A fact
that there is not (an input that is left out) fits everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError

from pocketglm.artifacts.graph import Graph, Node, Value
from pocketglm.artifacts.placement import Evidence, Unit
from pocketglm.contracts import Config
from pocketglm.errors import WorkError

RULES = Path(__file__).parent / "rules"

Scalar = bool | int | float | str


class Range(Config):
    """Numbers from `min` to `max`, that `multiple` divides."""

    min: float | None = None
    max: float | None = None
    multiple: int | None = None

    def holds(self, value: Any) -> bool:
        return not (
            isinstance(value, str)
            or (self.min is not None and value < self.min)
            or (self.max is not None and value > self.max)
            or (self.multiple is not None and value % self.multiple)
        )


Condition = dict[str, Scalar | list[Scalar] | Range]


class Need(Config):
    """What an operator must be like; see the module."""

    given: Condition = Field(default={}, alias="if")
    need: Condition | list[Condition]
    because: str
    rewrite: str = ""
    evidence: Evidence | None = None
    source: str | None = None


class Reference(Config):
    """Where a rule is from. version: of the file, program or page; date: when it was looked at."""

    title: str
    address: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
    version: str
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class Where(Config):
    """The devices that have it: any of these systems; accelerator: any of these kinds that one of
    these runtimes reaches; soc: how the chip's name begins; api: Android API levels.
    """

    os: list[str]
    accelerator: list[Literal["gpu", "npu"]] = []
    runtimes: list[str] = []
    soc: list[str] = []
    api: Range | None = None


class Rules(Config):
    """One delegate's rules."""

    title: str
    target: str
    runs_on: Unit
    lowered: bool = True
    evidence: Evidence
    source: str
    note: str = ""
    where: Where
    every: list[Need] = []
    plain: list[str] = []
    ops: dict[str, list[Need]]
    rewrites: dict[str, str] = {}
    unpacks: dict[str, Condition] = {}
    follows: dict[str, list[str]] = {}
    partitions: Literal["turns", "merged"] = "turns"
    keepers: list[str] = []
    sources: dict[str, Reference]


class Refusal(Config):
    """Why a node falls back."""

    because: str
    rewrite: str
    evidence: Evidence
    source: str


@cache
def all_rules() -> dict[str, Rules]:
    """By delegate, sorted.

    Raises:
        WorkError: a file does not fit the form; the message names the field.
    """
    return {file.stem: load_rules(file) for file in sorted(RULES.glob("*.yaml"))}


def load_rules(file: Path) -> Rules:
    """One file's rules; raises WorkError if it does not fit the form."""
    try:
        rules = Rules.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise WorkError(f"cannot read the rules {file}: {error}", "install pocketglm again") from (
            None
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WorkError(f"{file}: {where}: {first['msg']}", "install pocketglm again") from None
    needs = [need for group in (rules.every, *rules.ops.values()) for need in group]
    named = {rules.source, *(need.source for need in needs if need.source)}
    if unknown := named ^ set(rules.sources):
        raise WorkError(
            f"{file}: sources that are not there, or of nothing: {', '.join(sorted(unknown))}",
            "install pocketglm again",
        )
    return rules


@dataclass(frozen=True, slots=True)
class Scene:
    """What rules may ask of: a graph's values, who makes and who reads them, and the device.

    values: weights that are unpacked at loading are constants here.
    """

    values: Mapping[str, Value]
    makers: Mapping[str, Node]
    readers: Mapping[str, Sequence[Node]]
    device: Mapping[str, Scalar]


def scene_of(graph: Graph, device: Mapping[str, Scalar]) -> Scene:
    """The scene of a whole graph."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            readers.setdefault(name, []).append(node)
    return Scene(graph.values, makers, readers, device)


def refusal(rules: Rules, node: Node, scene: Scene) -> Refusal | None:
    """Why the delegate leaves a node; None: it takes it."""
    needs = rules.ops.get(node.op, [] if node.op in rules.plain else None)
    if needs is None:
        return _unknown(rules, node, f"no {node.op} in {rules.title}")
    for need in (*rules.every, *needs):
        if not holds(need.given, node, scene):
            continue
        ways = need.need if isinstance(need.need, list) else [need.need]
        if not any(holds(way, node, scene) for way in ways):
            return Refusal(
                because=need.because,
                rewrite=need.rewrite or rules.rewrites.get(node.op, ""),
                evidence=need.evidence or rules.evidence,
                source=rules.sources[need.source or rules.source].title,
            )
    return None


def unowned(rules: Rules, node: Node) -> Refusal:
    """Why a node is left that would go with another one, which is not there."""
    return _unknown(rules, node, "it belongs to no operator that is taken")


def _unknown(rules: Rules, node: Node, because: str) -> Refusal:
    return Refusal(
        because=because,
        rewrite=rules.rewrites.get(node.op, ""),
        evidence=rules.evidence,
        source=rules.sources[rules.source].title,
    )


def holds(condition: Condition, node: Node, scene: Scene) -> bool:
    """Whether all facts are as wanted."""
    return all(
        _fits(found, wanted)
        for name, wanted in condition.items()
        for found in _facts(name, node, scene)
    )


def _fits(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Range):
        return wanted.holds(found)
    return found in wanted if isinstance(wanted, list) else bool(found == wanted)


def _facts(name: str, node: Node, scene: Scene) -> Iterator[Any]:
    """The facts of this name: none, one, or one for each tensor."""
    subject, _, key = name.partition(".")
    if name == "version":
        yield node.version
    elif name == "inputs":
        yield sum(bool(value) for value in node.inputs)
    elif subject == "attr":
        yield from [node.attributes[key]] if key in node.attributes else []
    elif subject == "device":
        yield from [scene.device[key]] if key in scene.device else []
    else:
        for value in _tensors(subject, node, scene):
            yield from _of_value(key, value, scene)


def _tensors(subject: str, node: Node, scene: Scene) -> list[str]:
    """Names of values."""
    if subject in ("ins", "operands", "outs"):
        names = [name for name in (node.outputs if subject == "outs" else node.inputs) if name]
        wanted = subject != "operands"
        return [name for name in names if wanted or not scene.values[name].constant]
    names = list(node.inputs if subject.startswith("in") else node.outputs)
    index = int(subject.removeprefix("in").removeprefix("out"))
    return [names[index]] if index < len(names) and names[index] else []


def _of_value(key: str, name: str, scene: Scene) -> Iterator[Any]:
    value, maker = scene.values[name], scene.makers.get(name)
    readers = scene.readers.get(name, ())
    if key == "rank":
        yield len(value.shape)
    elif key == "static":
        yield None not in value.shape
    elif key == "elements":
        if None not in value.shape:
            yield math.prod(size or 0 for size in value.shape)
    elif key == "maker":
        yield maker.op if maker else ""
    elif key == "of_constant":
        yield maker is not None and scene.values[maker.inputs[0]].constant
    elif key == "readers":
        yield len(readers)
    elif key == "reader":
        yield from (node.op for node in readers)
    elif key.startswith("dim"):
        axis = int(key.removeprefix("dim"))
        if -len(value.shape) <= axis < len(value.shape) and value.shape[axis] is not None:
            yield value.shape[axis]
    else:
        yield getattr(value, key)
