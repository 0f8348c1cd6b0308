"""What each verb prints with `--json`: one object of the class below, named after the verb."""

from __future__ import annotations

from typing import Any, Literal

from pocketglm.artifacts.export import Parity
from pocketglm.artifacts.manifest import Step
from pocketglm.artifacts.placement import Placement
from pocketglm.artifacts.proof import Claim, Verdict
from pocketglm.contracts import Config
from pocketglm.errors import PocketError


class MetricResult(Config):
    """A fraction in 0..1 (or another unit) over `n` rows (or tokens), with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float
    unit: str = "fraction"


class InspectResult(Config):
    """`parts` are bytes by embedding / attention / ffn / head / other; see `opens_in`.

    A decoder's `head` is "lm" or "tied lm" (the head is the embedding); `kv_bytes_per_token` is
    that of its cache, in the form `kv_cache`: fp16 is assumed for a checkpoint whose cache is not
    quantized; an export's is as its file keeps it. `logits`: the
    positions that an export computes logits of. `command`: intents with their slots, of a model
    that was trained for commands. `layer_heads`, `layer_ffn`: attention heads and FFN channels of
    each layer where a pruned model's layers differ; `heads` is the greatest. `layer_ranks`: the
    factorized linear layers of each layer, with their ranks. `layer_blocks`: the block that each
    layer uses, where layers share them; `unified`, `top_k`: as in `BlockSpec`. `notes`: what a user
    should know, one sentence each.
    """

    path: str
    kind: Literal["checkpoint", "export", "proof"]
    architecture: str = ""
    parameters: int = 0
    bytes: int
    precision: str = ""
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    layer_heads: list[int] = []
    layer_ffn: list[int] = []
    layer_ranks: list[dict[str, int]] = []
    layer_blocks: list[int] = []
    unified: bool = False
    top_k: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    kv_bytes_per_token: int | None = None
    kv_cache: str = ""
    eos_ids: list[int] = []
    logits: Literal["last", "all"] | None = None
    command: dict[str, list[str]] | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    pooling: str = ""
    head: str = ""
    labels: list[str] = []
    parts: dict[str, int] = {}
    schemes: dict[str, int] = {}
    opens_in: dict[str, str] = {}
    notes: list[str] = []
    digest: str = ""
    lineage: list[Step] = []
    export: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None


class SizeResult(Config):
    """One size of the family. Bytes of the weights; int4 keeps embedding and head in INT8."""

    name: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    fp16_bytes: int
    int8_bytes: int
    int4_bytes: int
    kv_bytes_per_token: int


class SizesResult(Config):
    sizes: list[SizeResult]


class FigureResult(Config):
    """A value of a device profile, whether it was measured, and where: a key of `sources`."""

    value: Any
    kind: Literal["measured", "vendor", "inferred"]
    source: str


class DeviceResult(Config):
    """A profile as in `devices/profiles/NAME.yaml`; null: unknown. `memory_gb`: RAM as advertised;
    `app_memory_mb`: what one app may use, `app_memory_entitled_mb`: with iOS's entitlement for
    more; `bandwidth_gbs`: peak of the RAM, `bandwidth_measured_gbs`: what a program reached.
    """

    name: str
    title: str
    aliases: list[str]
    kind: str
    tier: str
    os: str
    year: FigureResult | None
    os_version: FigureResult | None
    soc: FigureResult
    cores: FigureResult | None
    isa: dict[str, FigureResult | None]
    memory_gb: FigureResult | None
    app_memory_mb: FigureResult | None
    app_memory_entitled_mb: FigureResult | None
    bandwidth_gbs: FigureResult | None
    bandwidth_measured_gbs: FigureResult | None
    accelerators: list[dict[str, Any]]
    levels: dict[str, FigureResult | None]
    sources: dict[str, dict[str, str]]


class DevicesResult(Config):
    """`rates`: of this machine (`--here`), GB and 1e9 operations a second; null: not measured."""

    devices: list[DeviceResult]
    rates: dict[str, float | None] | None = None


class InitResult(Config):
    """`tokenizer`: "bytes", "trained" or the folder that it was copied from."""

    out: str
    already_done: bool = False
    size: str
    parameters: int
    bytes: int
    dtype: str
    seed: int
    vocab_size: int
    tokenizer: str
    tokens: int


class TrainResult(Config):
    """`parameters`: of the model and its adapters while it trained; `trained_parameters`: of those,
    the ones that learned.
    """

    out: str
    already_done: bool = False
    task: str
    epochs: float
    steps: int
    best_epoch: int
    parameters: int
    trained_parameters: int
    validation: dict[str, MetricResult]
    loss_plot: str
    seconds: float


class EvalResult(Config):
    """`truncated`: share of the texts that were cut to the length limit. `baseline`: the model that
    it was compared with. `notes`: how it was measured.
    """

    path: str
    task: str
    data: str
    split: str
    primary: str
    metrics: dict[str, MetricResult]
    truncated: float = 0.0
    baseline: str | None = None
    notes: list[str] = []


class PredictResult(Config):
    path: str
    file: str
    out: str | None
    rows: int
    predictions: list[dict[str, Any]]


class StepResult(Config):
    """`reused`: taken from the step cache. Sizes in bytes."""

    method: str
    settings: dict[str, Any]
    reused: bool
    bytes_before: int
    bytes_after: int
    effect: dict[str, float] = {}
    seconds: float

    def figures(self) -> list[str]:
        """The effect in words, without the sizes and what is told by layer: 'accuracy 0.961',
        'parameters 22,713,216'.
        """
        return [
            f"{name.replace('_', ' ')} " + (f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}")
            for name, value in self.effect.items()
            if not name.startswith("bytes") and "." not in name
        ]


class CompressResult(Config):
    """With `--dry-run`, `bytes_after` is computed from the headers and nothing is written."""

    out: str
    dry_run: bool = False
    already_done: bool = False
    steps: list[StepResult]
    bytes_before: int
    bytes_after: int


class TargetResult(Config):
    """`error` says what was wrong, `hint` what to do next. `placement`: one entry for each delegate
    of the device and each graph of the file.

    peak_memory: the most bytes that the target's own process had in memory; null: it had none, or
    had nothing to do. log: what a target printed that crashed or was stopped.
    """

    target: str
    ok: bool
    out: str | None = None
    already_done: bool = False
    precision: str = ""
    bytes: int = 0
    parity: Parity | None = None
    peak_memory: int | None = None
    placement: list[Placement] = []
    error: str | None = None
    hint: str = ""
    exit_code: int = 0
    log: str | None = None

    @classmethod
    def failed(cls, target: str, error: PocketError) -> TargetResult:
        """Of a target that could not be exported."""
        return cls(
            target=target,
            ok=False,
            error=error.message,
            hint=error.hint,
            exit_code=error.exit_code,
        )


class ExportResult(Config):
    out: str
    targets: list[TargetResult]


class RunResult(Config):
    """`text` is the input. Of an encoder `label`, `score`, `top`, or `embedding`.

    Of a decoder `answer`; `finish` says what ended it: "stop" (end of text), "length"
    (--max-new-tokens) or "context" (the cache is full). A command model's answer is `action`, with
    `intent` and `slots` ({"name": ..., "value": ...}, in the order of the text).
    """

    path: str
    runtime: str
    text: str
    label: str | None = None
    score: float | None = None
    top: list[dict[str, Any]] = []
    embedding: list[float] | None = None
    answer: str | None = None
    intent: str | None = None
    slots: list[dict[str, str]] | None = None
    action: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    finish: Literal["stop", "length", "context"] | None = None
    prefill_per_second: float | None = None
    decode_per_second: float | None = None
    first_token_ms: float | None = None
    milliseconds: float


class BenchResult(Config):
    """Latencies in milliseconds, memory in bytes (peak RSS of a fresh process).

    Of an encoder: `p50_ms`, `p99_ms` and `mean_ms` are of one call with `batch` texts of `tokens`,
    `per_second` counts texts. Of a decoder: they are of one new token, `per_second` counts new
    tokens; `prefill_ms` (p50) and `prefill_per_second` are of a prompt of `tokens`. The
    `new_tokens` were decoded behind it, so at `tokens` to `tokens + new_tokens` of context; the
    choice of a token is not in it. The p50 of the first and the last third is told under sustained
    load (`--duration`) only.
    """

    path: str
    runtime: str
    threads: int
    batch: int
    tokens: int
    runs: int
    p50_ms: float
    p99_ms: float
    mean_ms: float
    per_second: float
    load_ms: float
    peak_rss_bytes: int
    size_bytes: int
    device: dict[str, str]
    kind: Literal["encoder", "decoder"] = "encoder"
    new_tokens: int | None = None
    prefill_ms: float | None = None
    prefill_per_second: float | None = None
    first_third_p50_ms: float | None = None
    last_third_p50_ms: float | None = None
    extra_memory: str = ""


class ProveResult(Config):
    out: str
    report: str
    verdict: Verdict
    claims: list[Claim]
    already_done: bool = False


class RangeResult(Config):
    """A prediction, and the range that four of five devices are in."""

    value: float
    low: float
    high: float


class LossResult(Config):
    """What a recipe cost: `value` points of a score, or percent more perplexity; the 95 % interval
    is null where none was told. `model`, `data`: what it was measured on; `ours`: by this
    project, else by the publisher of `source`, at `address`.
    """

    metric: str
    value: float
    unit: Literal["points", "%"]
    low: float | None = None
    high: float | None = None
    model: str
    data: str
    ours: bool
    source: str
    address: str | None = None


class LimitResult(Config):
    """`words`: where the limit is from."""

    name: Literal["memory", "latency", "speed", "accuracy", "context"]
    value: float
    unit: str
    words: str


class AdviceRow(Config):
    """One model by one recipe on one runtime and unit of the device.

    Memory and file in decimal MB. `first_token_ms`, `tokens_per_second`: of decoders; `latency_ms`:
    one text, or a whole answer. Null: nobody published what it takes to predict it, see `notes`.
    `losses`: empty if unknown. `accuracy`: percent, null if nobody measured it. `fits`: "probably"
    if a limit is inside of a prediction's range. `reason`: why it does not, or what is unknown;
    `exceeds`: the limits that it does not keep.
    `available`: this version can make it. `commands`: how.
    """

    model: str
    recipe: str
    title: str
    runtime: str
    unit: Literal["cpu", "gpu", "npu"]
    parameters: int
    file_mb: float
    memory_mb: RangeResult | None = None
    load_ms: RangeResult | None = None
    first_token_ms: RangeResult | None = None
    tokens_per_second: RangeResult | None = None
    latency_ms: RangeResult | None = None
    energy_j: RangeResult | None = None
    losses: list[LossResult] = []
    accuracy: float | None = None
    fits: Literal["yes", "probably", "no", "unknown"]
    reason: str = ""
    exceeds: list[Literal["memory", "latency", "speed", "accuracy", "context"]] = []
    available: bool
    plan: str | None = None
    commands: list[str] = []
    notes: list[str] = []


class AdviseResult(Config):
    """`rows` are ranked; `best` is the first of them that fits and that this version can make.

    `app_memory_mb`: what one app gets on the device, null if nobody knows. `hints`: what to change
    where nothing fits. `notes`: what a user should know, one sentence each.
    """

    device: str
    device_title: str
    task: str
    checkpoint: str | None = None
    prompt: int
    new_tokens: int
    context: int
    judged: str
    app_memory_mb: float | None = None
    limits: list[LimitResult]
    fits: bool
    best: AdviceRow | None = None
    rows: list[AdviceRow]
    hints: list[str] = []
    notes: list[str] = []


class CacheResult(Config):
    path: str
    entries: int
    bytes: int
    cleared: bool = False


class DemoCommands(Config):
    """The demo's decoder: its table beside the nearest training command, and the actions of the
    requests. `training_cpu_seconds`: of all threads; None: it was trained before.
    """

    report: str
    verdict: Verdict
    rows: list[dict[str, Any]]
    actions: list[dict[str, Any]]
    training_cpu_seconds: float | None


class DemoResult(Config):
    """`rows` is the before/after table of the encoders; `answers` the sentences they answered."""

    out: str
    report: str
    rows: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    commands: DemoCommands
    seconds: float


RESULTS: dict[str, type[Config]] = {
    "devices": DevicesResult,
    "sizes": SizesResult,
    "advise": AdviseResult,
    "init": InitResult,
    "inspect": InspectResult,
    "train": TrainResult,
    "eval": EvalResult,
    "predict": PredictResult,
    "compress": CompressResult,
    "export": ExportResult,
    "run": RunResult,
    "bench": BenchResult,
    "prove": ProveResult,
    "cache": CacheResult,
    "demo": DemoResult,
}
