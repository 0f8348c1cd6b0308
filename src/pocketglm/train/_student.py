"""Students: which model one is, and the weights that it begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.errors import UsageError, nearest
from pocketglm.model import bert, causal
from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.encoder import Encoder, init_encoder
from pocketglm.model.families import DECODERS, POCKETGLM
from pocketglm.model.layers import bare_modules
from pocketglm.model.sizes import SIZES, spec_of_size
from pocketglm.model.spec import DecoderSpec, EncoderSpec

Init = Literal["teacher", "random"]
Spec = EncoderSpec | DecoderSpec
AnySpec = TypeVar("AnySpec", EncoderSpec, DecoderSpec)
Model = TypeVar("Model", Encoder, Decoder)
Wanted = Mapping[str, Any] | str | None  # sizes, the path of a config.json, or the model as it is
# What a student has in common with the model that it replaces: it reads the same ids, and answers
# with the same labels.
_COMMON = ("vocab_size", "pooling", "head", "pooler", "num_labels", "pad_id", "type_vocab_size")
_DECODER_COMMON = ("vocab_size", "bos_id", "eos_ids", "pad_id")
_WIDTHS = (
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "layer_heads",
    "intermediate_size",
    "layer_ffn",
    "layer_ranks",
    "layer_blocks",
    "unified",
    "max_position_embeddings",
    "family",
    "tied",
)
_SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "tied",
)
# A student of other sizes has no such layers.
_PRUNED = ("head_dim", "layer_heads", "layer_ffn", "layer_ranks")


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of `layers` layers, spread evenly; the last one is among them."""
    return tuple((number + 1) * layers // count - 1 for number in range(count))


def chosen_layers(wanted: int | Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """The layers that a student keeps.

    Raises:
        UsageError: there are not that many, none is asked for, or a list is not ascending.
    """
    if wanted is None:
        return tuple(range(layers))
    if isinstance(wanted, int):
        if not 1 <= wanted <= layers:
            raise UsageError(f"layers: {wanted} of {layers}", f"choose 1 to {layers}")
        return spread(wanted, layers)
    outside = [layer for layer in wanted if not 0 <= layer < layers]
    if outside or not wanted:
        shown = f"there is no layer {outside[0]}" if outside else "the list is empty"
        raise UsageError(f"layers: {shown}", f"the model has the layers 0 to {layers - 1}")
    if list(wanted) != sorted(set(wanted)):
        raise UsageError(f"layers: {list(wanted)} should be ascending", "name each layer once")
    return tuple(wanted)


def with_layers(base: AnySpec, kept: Sequence[int]) -> AnySpec:
    """Only those layers, each with its own sizes where they differ."""
    own: dict[str, Any] = {
        field.name: tuple(sizes[layer] for layer in kept)
        for field in fields(base)
        if field.name.startswith("layer_")
        and isinstance(sizes := getattr(base, field.name), tuple)
        and sizes
    }
    return replace(base, num_layers=len(kept), **own)


def student_spec(
    base: EncoderSpec, layers: int | Sequence[int] | None, student: Wanted
) -> EncoderSpec:
    """The student of a model `base`: some of its layers, or other sizes.

    Raises:
        UsageError: it cannot be.
        CheckpointError: the config.json cannot be read.
    """
    if layers is not None and student is not None:
        raise UsageError("layers and student are both set", "give one of them")
    if student is None:
        return with_layers(base, chosen_layers(layers, base.num_layers))
    if isinstance(student, str):
        return _spec_of_file(base, Path(student))
    known = [field.name for field in fields(base) if field.name not in (*_COMMON, *_PRUNED)]
    for name in student:
        if name not in known:
            raise UsageError(f"student: there is no '{name}'", nearest(name, known))
    try:
        plain = {"head_dim": 0, "layer_heads": (), "layer_ffn": (), "layer_ranks": ()}
        sizes: dict[str, Any] = plain | dict(student)
        config = bert.config_of(replace(base, **sizes))
    except (TypeError, ValueError) as error:
        raise UsageError(f"student: {error}", "correct the sizes") from error
    return _spec_of_config(base, config, Path("student"))


def _spec_of_file(base: EncoderSpec, file: Path) -> EncoderSpec:
    if not file.is_file():
        raise UsageError(
            f"student: {file} is no file", "give sizes, or the path of a BERT model's config.json"
        )
    return _spec_of_config(base, read_json(file), file)


def _spec_of_config(base: EncoderSpec, config: Mapping[str, Any], file: Path) -> EncoderSpec:
    """Checks every field; what is common stays `base`'s."""
    common: dict[str, Any] = {name: getattr(base, name) for name in _COMMON}
    head = {name: common[name] for name in ("head", "pooling", "pooler", "num_labels")}
    own = config.get("model_type") == POCKETGLM
    return replace(bert.spec_of(config, file, own=own, **head), **common)


def decoder_student_spec(
    base: DecoderSpec, layers: int | Sequence[int] | None, student: Wanted
) -> DecoderSpec:
    """As `student_spec`; `student` may also be a size of the family."""
    if layers is not None and student is not None:
        raise UsageError("layers and student are both set", "give one of them")
    if student is None:
        return with_layers(base, chosen_layers(layers, base.num_layers))
    common: dict[str, Any] = {name: getattr(base, name) for name in _DECODER_COMMON}
    if isinstance(student, str):
        if student in SIZES:
            return replace(spec_of_size(student), **common)
        file = Path(student)
        if not file.is_file():
            raise UsageError(
                f"student: '{student}' is neither a size nor a file",
                f"sizes: {', '.join(SIZES)}; or give the path of a config.json",
            )
        return replace(_decoder_spec_of_config(read_json(file), file), **common)
    sizes: dict[str, Any] = dict(student)
    for name in sizes:
        if name not in _SIZES:
            raise UsageError(f"student: there is no '{name}'", nearest(name, _SIZES))
    try:
        share = base.rope.dims / base.head_dim
        dims = int(sizes.get("head_dim", base.head_dim) * share)
        plain: dict[str, Any] = {"layer_ffn": (), "layer_ranks": (), "layer_blocks": (), **sizes}
        spec = replace(base, **plain, rope=replace(base.rope, dims=dims))
        config = DECODERS[spec.family].config_of(spec)
    except (TypeError, ValueError) as error:
        raise UsageError(f"student: {error}", "correct the sizes") from error
    checked = _decoder_spec_of_config(config | {"model_type": spec.family}, Path("student"))
    return replace(checked, **common)


def _decoder_spec_of_config(config: Mapping[str, Any], file: Path) -> DecoderSpec:
    family = config.get("family" if config.get("model_type") == POCKETGLM else "model_type")
    if family not in DECODERS:
        raise UsageError(f"{file}: model_type {family!r}", f"known: {', '.join(DECODERS)}")
    module = DECODERS[family]
    fields_of = causal.Fields(config, file, module.DEFAULTS)
    spec: DecoderSpec = module.spec_of(fields_of, family, not fields_of.flag("tie_word_embeddings"))
    return spec


def init_reason(base: Spec, spec: Spec, kept: Sequence[int]) -> str | None:
    """Why the layers `kept` of `base` do not fit into `spec`; None: they do."""
    if spec.num_layers > base.num_layers:
        return (
            f"init: the student has {spec.num_layers} layers, the model only {base.num_layers}: "
            "set init to random"
        )
    if isinstance(base, EncoderSpec):
        whole: Spec = with_layers(base, kept)
    else:
        whole = with_layers(base, kept)
    old, new = ({name: getattr(s, name, None) for name in _WIDTHS} for s in (whole, spec))
    if other := [name for name in _WIDTHS if old[name] != new[name]]:
        shown = ", ".join(f"{name} {new[name]} instead of {old[name]}" for name in other)
        return f"init: the model's weights do not fit a student with {shown}: set init to random"
    return None


def make_student(
    base: Model, spec: EncoderSpec | DecoderSpec, kept: Sequence[int], init: Init, seed: int
) -> Model:
    """A model of `spec`: new, or with copies of `base`'s weights, of whose layers it has `kept`."""
    student: Any
    if init == "random":
        student = (
            init_encoder(spec, seed) if isinstance(spec, EncoderSpec) else init_decoder(spec, seed)
        )
        return cast(Model, student)
    with bare_modules():
        student = Encoder(spec) if isinstance(spec, EncoderSpec) else Decoder(spec)
    old, blocks = base.state_dict(), tuple(kept)  # the base's block for each of the student's
    if isinstance(base, Decoder):
        blocks = tuple(base.spec.blocks()[kept[layer]] for layer in student.spec.first_layers())
    state: dict[str, Tensor] = {}
    for name in student.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(blocks[int(parts[1])])
        state[name] = old[".".join(parts)].clone()
    student.load_state_dict(state, assign=True)
    return cast(Model, student.eval())
