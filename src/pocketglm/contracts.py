"""The extension contract, on one page.

A method, target, runtime or task is one file that ends in `SPEC = ...`, an instance of one of
the classes below. `registry.load` finds it by its file name. Nothing else has to be edited.

    methods/NAME.py   SPEC = TensorMethod(...), BlockMethod(...) or ModelMethod(...)
                                                   Checkpoint -> Checkpoint
    targets/NAME.py   SPEC = Target(...)           Checkpoint -> Export
    runtimes/NAME.py  SPEC = Runtime(...)          Checkpoint | Export -> Session
    eval/NAME.py      SPEC = Task(...)             Session + rows -> Scores
    checks/NAME.py    SPEC = Check(...)            Graphs + target + device -> Placements

Shapes: B batch, S tokens, C classes or hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo
    from pocketglm.artifacts.graph import Graph
    from pocketglm.artifacts.placement import Placement
    from pocketglm.artifacts.scheme import TensorScheme
    from pocketglm.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reporter(Protocol):
    """Where a long piece of work tells how far it is. The CLI's draws on stderr."""

    def say(self, text: str) -> None:
        """One line of words."""

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `label`; `note` is a short state such as `loss 0.41`.

        A target tells the name of a part before it works on it: after a crash, that is where it
        was.
        """


class Silent:
    """A Reporter that tells nobody."""

    def say(self, text: str) -> None:
        pass

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        pass


# --- methods -----------------------------------------------------------------------------------

if TYPE_CHECKING:
    # int8 [N, K], scales float32 [N, G], zero points int8 [N, G] (None: symmetric)
    Integers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class TensorMethod:
    """A method that sees one tensor at a time, so its memory is that of one tensor.

    `select` decides from the header alone (so a dry run costs nothing): the scheme that a tensor
    will be stored in, or None to copy it. `quantize` turns float [rows, columns], of the type that
    is stored, into integers of the same shape (int8), scales and zero points; `ops.stored` stores
    them.
    `check` returns the reasons why this checkpoint cannot be processed, before any work.
    """

    summary: str
    config: type[Config]
    check: Callable[[Any, Checkpoint], list[str]]
    select: Callable[[Any, Checkpoint, TensorInfo], TensorScheme | None]
    quantize: Callable[[Any, torch.Tensor, TensorScheme], Integers]


class TaskRows(Protocol):
    """A task's rows for learning, as its reader gives them; every row has a `text`.

    contents: all of them as JSON values, for a digest. The test rows are never among them.
    """

    @property
    def train(self) -> Sequence[Any]: ...
    @property
    def validation(self) -> Sequence[Any]: ...
    @property
    def contents(self) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step may use beside its settings and its checkpoint.

    source: the plan's own input; the teacher of a step that needs one and names none. cache: where
    a step may keep what other runs can use again, in folders named by a sha256 of what decides it.
    task, data, rows: what the model is for, where to find it, and what was read there; None: not
    given.
    """

    source: Checkpoint
    seed: int
    reporter: Reporter
    cache: Path
    task: str | None = None
    data: DataOptions | None = None
    rows: TaskRows | None = None


@dataclass(frozen=True, slots=True)
class ModelMethod:
    """A method that sees the whole model, and rows of the task if it asks for them.

    `check` returns the reasons why it cannot work on this checkpoint, from headers, settings and
    rows alone. `predict` returns the checkpoint after the step as headers (config, tensors,
    manifest; `model.hf.predicted` makes them); where only the work itself can tell the sizes, an
    upper estimate. `run` writes the whole checkpoint into a folder (`save_encoder`, ...) and
    returns what it measured; `folder / WORK` is for files with which a killed run resumes, it is
    removed afterwards. The step's lineage, size and score are added by `stages.compress`.
    `inputs`: files or folders that the settings name; their contents belong to the step's key.
    `identity`: settings with which no weight changes; None: there are none.
    `memory`: bytes that `run` holds at most beside the program; None: those of training.
    `in_parts`: it never holds the whole model, so a large one is not scored either.
    """

    summary: str
    config: type[Config]
    check: Callable[[Any, Checkpoint, StepContext], list[str]]
    predict: Callable[[Any, Checkpoint, StepContext], Checkpoint]
    run: Callable[[Any, Checkpoint, Path, StepContext], Mapping[str, float]]
    needs_rows: Callable[[Any], bool] = lambda config: False
    inputs: Callable[[Any], Sequence[Path]] = lambda config: ()
    identity: Mapping[str, Any] | None = None
    memory: Callable[[Any, Checkpoint, StepContext], int] | None = None
    in_parts: bool = False


@dataclass(frozen=True, slots=True)
class BlockWork:
    """One transformer block, and what goes into it.

    block: float32, in eval mode. schemes: of its layers to quantize, by their names in it, such as
    `attention.query`. hidden: float32 [B, S, H], batches of rows of one length, without padding.
    call: the block on one such batch. stored: how a parameter is stored, e.g. BF16, by its name.
    """

    index: int
    block: torch.nn.Module
    schemes: Mapping[str, TensorScheme]
    hidden: Sequence[torch.Tensor]
    call: Callable[[torch.Tensor], torch.Tensor]
    stored: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Integers, scales and zero points as of `TensorMethod.quantize` for each of a block's
    `schemes`, and what was measured. `words`: of these, for the one who waits.
    """

    integers: Mapping[str, Integers]
    figures: Mapping[str, float]
    words: str = ""


@dataclass(frozen=True, slots=True)
class BlockMethod:
    """A method that sees one block of the model at a time, with what goes into it on rows of the
    task; its memory is that of one block and of these inputs.

    `check` as in `ModelMethod`, `select` and `quantize` as in `TensorMethod`; `quantize` is for
    weights outside of the blocks. `block` quantizes the layers of one; it may change the block's
    other parameters too. Afterwards the block must compute with the values that the integers stand
    for: what it gives then goes into the next one. `effect` turns the figures of all blocks into
    the step's. `tokens`: how many of the rows it asks for. `memory`: bytes for the block of this
    number, beside its weights and inputs.
    """

    summary: str
    config: type[Config]
    check: Callable[[Any, Checkpoint, StepContext], list[str]]
    select: Callable[[Any, Checkpoint, TensorInfo], TensorScheme | None]
    quantize: Callable[[Any, torch.Tensor, TensorScheme], Integers]
    block: Callable[[Any, BlockWork], BlockResult]
    effect: Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]]
    tokens: Callable[[Any], int]
    memory: Callable[[Any, Checkpoint, int], int]


WORK = "work"  # what a method keeps for a resume
Method = TensorMethod | BlockMethod | ModelMethod


# --- targets and runtimes ----------------------------------------------------------------------


ComputeUnits = Literal["all", "cpuAndNeuralEngine", "cpuAndGPU", "cpuOnly"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What `export` was asked for, beyond the target's name.

    max_length: tokens per text; of a decoder, prompt and answer together (its cache). logits: the
    positions that a decoder's file computes logits of. spinning: threads wait busily.
    max_memory: bytes that the process may have resident; None: no limit. device: for which; a
    profile's name. delegate: that the app will ask for. allow_fallback: even if it takes little.
    Of Core ML: deployment, the oldest system that must open it, such as "iOS17"; compute_units, the
    processors that it is laid out for; compute_precision, the type of its values; None: the target
    chooses, and says what.
    """

    opset: int | None = None
    max_length: int | None = None
    threads: int | None = None
    logits: Literal["last", "all"] = "last"
    spinning: bool = False
    max_memory: int | None = None
    deployment: str | None = None
    compute_units: ComputeUnits | None = None
    compute_precision: Literal["float16", "float32"] | None = None
    device: str | None = None
    delegate: str | None = None
    allow_fallback: bool = False


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a target wrote: the parts of `export.json` that only it knows."""

    model_file: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    operators: dict[str, int]
    minimum: dict[str, str] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)  # bytes of the weights by part of the model
    activation: str = "none"  # the form in which the file quantizes the linear layers' inputs
    floats: Literal["fp32", "fp16"] = "fp32"  # the type of constants that are not quantized
    cache: Literal["float32", "float16"] = "float32"  # a decoder's, where it is not quantized
    digests: dict[str, str] = field(default_factory=dict)  # sha256 of files, taken while writing
    links: list[str] = field(default_factory=list)  # an app's libraries beside the runtime's core


@dataclass(frozen=True, slots=True)
class Tolerance:
    """By how much a file's values of size 1 may differ from the checkpoint's; larger ones in
    proportion.

    part: one part of it, and the whole without its runtime's optimizations, both in float32. whole:
    as its runtime computes it, activations not quantized.
    """

    part: float = 1e-4
    whole: float = 1e-4


@dataclass(frozen=True, slots=True)
class Target:
    """One file format. `supports` returns the reasons of a refusal; `lower` writes the files.

    `blocks` runs the written file with activation quantization off, for parity: model file, ids
    and mask [B, S] -> the values that the model's parts end with, one after the other, [B, S, H] or
    [B, C]: `embeddings`, `block.0`, `block.1`, ... and `head` (of a decoder [B, V]: the logits of
    each row's last token). A decoder's also gives tables of which few ids say little, in ranges of
    their rows: `rows.0:512` [rows, H] of an embedding that is not the head, and `rotary.0:4096`
    [2, positions, dims / 2], cosines and sines; and before a block's values, where it keeps
    integers in its cache, these: `cache.0` [2, B, kv heads, S, head_dim].

    `graphs` says from the headers what `lower` will write, so that a check can tell where it will
    run; None: its runtime has no delegates. `systems`: of the devices that its runtime is for; ():
    any.
    """

    summary: str
    runtime: str
    supports: Callable[[Checkpoint, ExportOptions], list[str]]
    lower: Callable[[Checkpoint, Path, ExportOptions, Reporter], Lowered]
    blocks: Callable[[Path, Ids, Ids], Iterable[tuple[str, Floats]]]
    tolerance: Tolerance = Tolerance()
    graphs: Callable[[Checkpoint, ExportOptions], Sequence[Graph]] | None = None
    systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a runtime opens a model. `threads=None`: all cores that this process may use.

    context: tokens that a decoder's cache can hold; None: as many as the model or file allows.
    """

    threads: int | None = None
    spinning: bool = False
    optimize: bool = True
    context: int | None = None


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a caller must know about an open model. `threads`: how many it was opened with.

    max_length: of an encoder, tokens per text; of a decoder, prompt and answer together.
    scores: the positions that one call of a decoder's file has logits of.
    """

    runtime: str
    output: str  # "logits" or "sentence_embedding"
    kind: Literal["encoder", "decoder"] = "encoder"
    labels: tuple[str, ...] = ()
    max_length: int = 512
    pooling: str = ""
    activation: str = "none"
    threads: int = 0
    vocab_size: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    scores: Literal["last", "all"] = "all"


class EncoderSession(Protocol):
    """An open encoder; numpy in, numpy out. Rows are right-padded."""

    info: SessionInfo

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> [B, C]: class logits, or unit-length embeddings."""

    def close(self) -> None:
        """Free the model."""


class DecoderSession(Protocol):
    """An open decoder with one text in its cache; numpy in, numpy out. Logits are float32 [V].

    The text never becomes longer than `info.max_length`; each call that would make it longer
    raises UsageError and changes nothing.
    """

    info: SessionInfo

    @property
    def length(self) -> int:
        """Tokens of the text so far."""

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one."""

    def step(self, token: int) -> Floats:
        """Append one token; the logits after it."""

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""

    def fork(self) -> DecoderSession:
        """A session with a copy of the text so far; it shares the weights."""

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits [S, V] of a text of its own, at every position; leaves this session as it is."""

    def close(self) -> None:
        """Free the model."""


Session = EncoderSession | DecoderSession


@dataclass(frozen=True, slots=True)
class Runtime:
    """Opens a folder. A package that is not in the core is imported by `errors.require`.

    delegate: what `RunOptions.optimize` switches on and off; empty: nothing. emulated: on this
    machine a reference evaluator computes what the runtime would, so speed and memory say nothing.
    prepare: imports what is slow to import, before the load time is measured: that is the
    interpreter's time, not the model's. extra_memory: what of the process an app would not have.
    """

    summary: str
    open: Callable[[Path, RunOptions], Session]
    delegate: str = ""
    emulated: bool = False
    prepare: Callable[[], object] | None = None
    extra_memory: str = ""


# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured value with its 95 % interval over `n` rows, or tokens; fractions, not percent."""

    value: float
    n: int
    low: float
    high: float
    unit: str = "fraction"


@dataclass(frozen=True, slots=True)
class Scores:
    """What a task measured. `rows` holds per-row values, for paired comparison of two models.

    truncated: share of the texts that were cut to the length limit. notes: how it was measured,
    one sentence each.
    """

    primary: str
    metrics: Mapping[str, Metric]
    rows: Mapping[str, npt.NDArray[np.float64]]
    predictions: Sequence[str] = ()
    gold: Sequence[str] = ()
    texts: Sequence[str] = ()
    truncated: float = 0.0
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which rows to read, and which columns hold what.

    divided_by: the text and label column with which the model was trained on this very file; only
    the rows that training held out for test are read then.
    """

    path: Path
    text_column: str = "text"
    label_column: str = "label"
    oos_label: str = "oos"
    limit: int | None = None
    divided_by: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One way to score a Session on a data folder's test split.

    `kind`: of the models that can do it, and so of the session. A task that needs more than the
    session (a command's grammar) reads it from the model's folder, the first argument of `score`.
    `against` scores the session next to another one of the same tokenizer, which comes second.
    """

    summary: str
    score: Callable[[Path, Any, Tokenizer, DataOptions, int | None, Reporter], Scores]
    kind: Literal["encoder", "decoder"] = "encoder"
    against: (
        Callable[[Path, Any, Any, Tokenizer, DataOptions, int | None, Reporter], Scores] | None
    ) = None


# --- checks ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """A look at an export before it is made: the graphs that a target will write, the target's
    name, and a device's.
    """

    summary: str
    run: Callable[[Sequence[Graph], str, str], Sequence[Placement]]
