"""Why a target refuses schemes of a checkpoint's weights, and the nearest ones that it carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.targets._onnx_rows import stored_shape

_GROUPS = (32, 64, 128)  # what the methods offer
_ACTIVATIONS: tuple[Activation, ...] = ("dynamic_block", "dynamic_token", "none")
_WIDER = 4  # fewer bits are worth more than all other fields

# Of the weight that is stored as `name`: why not, or ''.
Refuse = Callable[[str, TensorScheme], str]


def scheme_reasons(
    ckpt: Checkpoint, refuse: Refuse, names: Sequence[str] | None = None, *, tied: bool = False
) -> list[str]:
    """One for each cause: the first weight, how many more, the cause, and what to compress with.

    names: of the weights that are looked at; None: all. tied: their activation form is not theirs
    to choose, but the other layers'.
    """
    found: dict[str, list[str]] = {}
    for name in ckpt.manifest.schemes if names is None else names:
        scheme = ckpt.manifest.schemes[name]
        if cause := refuse(name, scheme):
            columns = stored_shape(ckpt, name)[1]
            works = partial(_works, refuse, name)
            other = nearest(scheme, columns, works, tied=tied)
            found.setdefault(cause + (f": compress with {other}" if other else ""), []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in found.items()
    ]


def _works(refuse: Refuse, name: str, scheme: TensorScheme) -> bool:
    return not refuse(name, scheme)


def nearest(
    scheme: TensorScheme,
    columns: int,
    works: Callable[[TensorScheme], bool],
    *,
    tied: bool = False,
) -> str:
    """The settings that a method must be given for the most similar scheme of rows of `columns`
    that works; '' if none does.
    """
    own = scheme.group_size
    groups = sorted(_GROUPS, key=lambda size: abs(size - (own or size)))
    candidates = []
    for bits, group, activation, symmetric in product(
        dict.fromkeys((scheme.bits, 8)),
        dict.fromkeys((own, *groups, None)),
        (scheme.activation,) if tied else dict.fromkeys((scheme.activation, *_ACTIVATIONS)),
        dict.fromkeys((scheme.symmetric, True)),
    ):
        if group not in (None, *_GROUPS) or columns % (group or 1):
            continue
        if bits == 4 and group is None and own is not None:
            continue  # the methods make groups of 32 then
        other = TensorScheme(
            bits=bits, group_size=group, symmetric=symmetric, activation=activation
        )
        changes = _changes(scheme, other)
        cost = len(changes) + (_WIDER if bits != scheme.bits else 0)
        candidates.append((cost, changes, other))
    for _, changes, other in sorted(candidates, key=lambda entry: entry[0]):
        if changes and works(other):
            return ", ".join(changes)
    return ""


def _changes(scheme: TensorScheme, other: TensorScheme) -> list[str]:
    changes = []
    if other.bits != scheme.bits:
        changes.append(f"bits: {other.bits}")
    if other.group_size != scheme.group_size:
        changes.append(f"group_size: {other.group_size}" if other.group_size else "no group_size")
    if other.symmetric != scheme.symmetric:
        changes.append("symmetric: true")
    if other.activation != scheme.activation:
        changes.append(f"activation: {other.activation}")
    return changes
