"""Does an exported encoder compute what its checkpoint computes?

Three comparisons on embedded sample sentences of 1 to `max_length` tokens:
* block by block, activation quantization off: each block of the checkpoint in PyTorch gets what the
  file's own previous block gave, so that errors do not add up and the faulty block is named;
* the whole file as shipped, in its runtime, against the checkpoint in float32; static activations,
  whose grids are the checkpoint's own, are rounded on both sides;
* the runtime's delegate, such as its graph optimizer or XNNPACK, on against off, where it has one.

Constants that the file has in fp16 are rounded on both sides.
Where the runtime is an extra that is not installed, the first comparison alone is made, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax, normalize

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import Difference, ExportManifest, Parity
from pocketglm.contracts import Floats, Ids, Reporter, RunOptions, Runtime, Target, Tolerance
from pocketglm.errors import MissingExtraError, ParityError
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_encoder, stored_name
from pocketglm.model.inputs import input_grids
from pocketglm.ops.fake_quant import quantized_inputs
from pocketglm.ops.stored import check_finite, parameter_counts
from pocketglm.runtimes import open_encoder
from pocketglm.text.tokenizer import Tokenizer

SAMPLES = (
    "Stop",
    "hello",
    "set an alarm",
    "What is the weather like in Paris tomorrow?",
    "打开地图",
    "明天早上七点叫我起床，然后播放一首安静的歌。",
    "Call my sister and tell her that I will be twenty minutes late for dinner tonight.",
    "Turn the volume down to 30 % and skip this song!",
    "How many kilometres are there in 26.2 miles?",
    "Remind me to water the plants every other Thursday at half past six in the evening.",
    "ok",
    "I'd like to transfer $1,250.00 from my savings to my checking account, please.",
    "Which of the two restaurants near the station has the better reviews, and is it still open?",
    "A man in a red jacket is walking his two dogs along the beach while the sun goes down.",
    "Translate 'good morning, how are you?' into French.",
    "The committee agreed, after a long and at times heated debate, to postpone its decision until "
    "the independent report on costs, risks and benefits is published later in the year.",
)
# By the form of the activations: share of the output's standard deviation by which one value may
# differ, and the agreement to reach. One int8 scale per tensor costs 1-2 % of the range at each of
# its layers; a wrong weight or connection costs far more.
LIMITS = {
    "none": (0.0, 0.999),
    "float16": (0.05, 0.99),  # in some places the runtime computes with half precision
    "dynamic_block": (0.5, 0.9),
    "dynamic_token": (1.0, 0.85),
    "dynamic_tensor": (1.5, 0.8),
    "static": (1.0, 0.9),
    "mixed": (1.5, 0.8),
}
# Share by which the graph optimizer on and off may differ. On x86 they gave the same bits in every
# quantized form tried (tests' small models, a 6-layer classifier in INT8) and 2e-6 in float32. But
# a fusion may move a float by one rounding, and some integers with it: norm weights changed by one
# rounding (2e-7) moved outputs by 0.16 at dynamic_tensor and 0.015 at dynamic_block. Twice that, or
# more, is no rounding. Static forms showed 0.04 to 0.36: one rounding that turns out the other way
# is a whole step, which is wide where a range holds outliers, and later layers round what it moved.
# In LiteRT "off" means other kernels: static forms showed up to 0.72 there (a 6-layer classifier).
OPTIMIZER_LIMITS = {
    "none": 0.0,
    "float16": 0.02,
    "dynamic_block": 0.1,
    "dynamic_token": 0.3,
    "dynamic_tensor": 0.3,
    "static": 1.0,
    "mixed": 0.3,
}
_EXACT = Tolerance()
_NEAR_TIE = 0.25  # of the output's standard deviation


@dataclass(frozen=True, slots=True)
class _Batch:
    ids: Ids
    mask: Ids


def check_parity(
    ckpt: Checkpoint, folder: Path, manifest: ExportManifest, target: Target, reporter: Reporter
) -> Parity:
    """Compare the files in `folder`, whose export.json is `manifest`, with the checkpoint.

    Raises:
        ParityError: a block or the whole differs by more than the form of the file explains.
        CheckpointError: a weight of the checkpoint holds NaN or infinity.
    """
    model = load_encoder(ckpt)
    for name, values in model.state_dict().items():
        stored = stored_name(ckpt, name)
        check_finite(ckpt, stored, values)
        if manifest.floats == "fp16" and stored not in ckpt.manifest.schemes:
            values.copy_(values.half())
    batches = list(_samples(folder, manifest.max_length))
    file = folder / manifest.model_file
    blocks: dict[str, float] = {}
    for batch in batches:
        for name, difference in _compare_blocks(model, target, file, batch, reporter).items():
            blocks[name] = max(difference, blocks.get(name, 0.0))
    reporter.progress("checking parity", len(blocks), len(blocks))
    with torch.inference_mode(), quantized_inputs(model, input_grids(ckpt, model)):
        wanted = np.concatenate([_torch(model, batch).numpy() for batch in batches])
    try:
        shipped, plain = on_and_off(
            manifest, lambda options: _run(folder, batches, options), reporter
        )
    except MissingExtraError as error:
        return by_parts(blocks, wanted, target.tolerance, error, reporter)
    classes = bool(manifest.labels)
    return judge(manifest, wanted, shipped, plain, blocks, target.tolerance, classes=classes)


def on_and_off(
    manifest: ExportManifest, run: Callable[[RunOptions], Floats], reporter: Reporter
) -> tuple[Floats, Floats | None]:
    """What `run` gives with the runtime's delegate and without; None: the runtime has no switch."""
    runtime: Runtime = registry.load("runtimes", manifest.runtime)
    ways = f", with and without {runtime.delegate}" if runtime.delegate else ""
    reporter.say(f"checking parity of the whole file{ways}")
    shipped = run(RunOptions(optimize=True))
    return shipped, run(RunOptions(optimize=False)) if runtime.delegate else None


def by_parts(
    blocks: dict[str, float],
    wanted: Floats,
    tolerance: Tolerance = _EXACT,
    missing: MissingExtraError | None = None,
    reporter: Reporter | None = None,
) -> Parity:
    """Parity of a file whose parts alone were compared. wanted: the checkpoint's outputs [n, C].

    missing: the runtime's package is not installed.
    """
    if missing and reporter:
        reporter.say(f"only the parts of the file were compared: {missing.message}; {missing.hint}")
    std = float(wanted.std())
    return Parity(
        scope="blocks",
        n=len(wanted),
        output_max_abs=blocks["head"],
        output_std=std,
        tolerance=tolerance.part * max(1.0, std),
        agreement=None,
        blocks=blocks,
    )


def encoder_buffers(ckpt: Checkpoint) -> int:
    """An upper estimate of the bytes that exporting and comparing an encoder hold at once.

    The model in float32, and its file as it is written, read and opened.
    """
    parameters = sum(parameter_counts(ckpt).values())
    return 4 * parameters + 4 * max(ckpt.nbytes, 4 * parameters * (not ckpt.manifest.schemes))


def _samples(folder: Path, max_length: int) -> Iterator[_Batch]:
    """All samples in one padded batch, then one row of the greatest length."""
    tokenizer = Tokenizer.load(folder)
    for texts in (SAMPLES, [" ".join(SAMPLES * (1 + max_length // 100))]):
        encoded = tokenizer.encode(texts, max_length)
        yield _Batch(encoded.ids, encoded.mask)


def _torch(model: Encoder, batch: _Batch) -> torch.Tensor:
    result: torch.Tensor = model(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
    return result


@torch.inference_mode()
def _compare_blocks(
    model: Encoder, target: Target, file: Path, batch: _Batch, reporter: Reporter
) -> dict[str, float]:
    """Worst absolute difference per block, at tokens that are not padding.

    Raises:
        ParityError: names the first block beyond the tolerance.
    """
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
    found = target.blocks(file, batch.ids, batch.mask)
    attend, keep = mask.bool()[:, None, None, :], mask.bool().numpy()
    differences: dict[str, float] = {}
    x = torch.empty(0)
    for name, value in found:
        reporter.progress("checking parity", len(differences), model.spec.num_layers + 2, name)
        if name == "embeddings":
            wanted = model.embeddings(ids)
        elif name == "head":
            pooled = model.pool(x, mask)
            wanted = model.classifier(pooled) if model.classifier else normalize(pooled, dim=-1)
        else:
            wanted = model.blocks[int(name.removeprefix("block."))](x, attend)
        x = torch.from_numpy(value)
        expected = wanted.numpy()
        if name != "head":
            expected, value = expected[keep], value[keep]
        differences[name] = worst(expected, value)
        limit = target.tolerance.part * max(1.0, float(np.abs(expected).max()))
        if not differences[name] <= limit:
            raise ParityError(
                f"'{name}' of the written file differs from the checkpoint by "
                f"{differences[name]:.3g} (limit {limit:.3g}), activation quantization off",
                "this is a defect of the export: please report it with this checkpoint's config",
            )
    return differences


def _run(folder: Path, batches: list[_Batch], options: RunOptions) -> Floats:
    session = open_encoder(folder, options)
    try:
        return np.concatenate([session.logits(batch.ids, batch.mask) for batch in batches])
    finally:
        session.close()


def worst(a: Floats, b: Floats) -> float:
    """The greatest absolute difference."""
    return float(np.abs(a - b).max())


def judge(
    manifest: ExportManifest,
    wanted: Floats,
    shipped: Floats,
    plain: Floats | None,
    blocks: dict[str, float],
    tolerance: Tolerance = _EXACT,
    *,
    classes: bool,
) -> Parity:
    """Parity of the outputs [n, C] of checkpoint and file, its delegate on and off (None: none).

    classes: the greatest of C values is the answer; else they are a vector of unit length.

    Raises:
        ParityError: they differ by more than the form of the file explains.
    """
    kind, int8_cache = manifest.activation, manifest.cache is not None and manifest.cache.scheme
    if int8_cache and kind == "none":
        kind = "dynamic_block"  # as there, a value near the middle between two integers may move
    share, needed = LIMITS[kind]
    std = float(wanted.std())
    # fp16 is as coarse as its values are large.
    size = max(1.0, float(np.abs(wanted).max()) if manifest.floats == "fp16" else std)
    exact = tolerance.whole * size
    optimizer_limit = OPTIMIZER_LIMITS[kind] * std or exact
    agreement = _agreement(wanted, shipped, std, classes=classes)
    parity = Parity(
        scope="whole",
        n=len(wanted),
        output_max_abs=worst(wanted, shipped),
        output_std=std,
        tolerance=share * std or exact,
        agreement=agreement,
        optimizer_max_abs=0.0 if plain is None else worst(shipped, plain),
        delegate_on=_difference(wanted, shipped, classes=classes),
        delegate_off=None if plain is None else _difference(wanted, plain, classes=classes),
        blocks=blocks,
    )
    form = f"{manifest.precision}, activations {manifest.activation}"
    form += ", INT8 cache" if int8_cache else ""
    accurate = "choose a more accurate form: compress with --set activation=dynamic_block or none"
    if manifest.floats == "fp16" and kind == "none":
        accurate = "fp16 is too coarse for this model: export with --compute-precision float32"
    for what, difference, limit, hint in (
        (
            "the written file differs from the checkpoint",
            parity.output_max_abs,
            parity.tolerance,
            accurate,
        ),
        (
            "the file with its runtime's optimizer on differs from off",
            parity.optimizer_max_abs,
            optimizer_limit,
            "a graph optimization of this runtime version is wrong here: try another version",
        ),
        (
            "the file without its runtime's optimizations differs from the checkpoint",
            worst(wanted, plain) if plain is not None and share == 0 else 0.0,
            tolerance.part * size,
            "this is a defect of the export: please report it with this checkpoint's config",
        ),
    ):
        if not difference <= limit:
            raise ParityError(
                f"{what} by {difference:.3g}; the limit for {form} is {limit:.3g} "
                f"(the output's standard deviation is {std:.3g})",
                hint,
            )
    if agreement < needed:
        raise ParityError(
            f"the written file agrees with the checkpoint to {agreement:.3f} only; {form} "
            f"should reach {needed}",
            accurate,
        )
    return parity


def _difference(wanted: Floats, found: Floats, *, classes: bool) -> Difference:
    """How `found` [n, C] differs from `wanted`; as answers only where there are classes."""
    if not classes:
        return Difference(max_abs=worst(wanted, found))
    p, q = (log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (wanted, found))
    return Difference(
        max_abs=worst(wanted, found),
        kl=float(kl_div(q, p, reduction="batchmean", log_target=True).clamp(min=0)),
        flip_rate=float((wanted.argmax(axis=1) != found.argmax(axis=1)).mean()),
    )


def _agreement(wanted: Floats, found: Floats, std: float, *, classes: bool) -> float:
    """Share of rows with the same answer, near ties aside; or the smallest cosine."""
    if not classes:
        return float((wanted * found).sum(axis=1).min())
    rows = np.arange(len(wanted))
    lost = wanted.max(axis=1) - wanted[rows, found.argmax(axis=1)]
    return float((lost <= _NEAR_TIE * std).mean())
