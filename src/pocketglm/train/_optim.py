"""Parts of the loop that keep no state: processes, parameter groups, learning rate, precision."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from pocketglm.errors import require

Precision = Literal["auto", "fp32", "bf16"]


def accelerator() -> Any:
    """accelerate's Accelerator for this process, one of several under a launcher.

    Without an accelerator device it is told to use the CPU: accelerate would otherwise take
    processes that torchrun started on a machine without GPUs for separate runs.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    on_cpu = not torch.accelerator.is_available()
    # Mixed precision is the loop's own: accelerate's would patch the model for good.
    return require("accelerate", extra="train").Accelerator(cpu=on_cpu, mixed_precision="no")


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16; 'auto' only where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Mapping[str, Any] = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    head_multiplier: float,
    weight_decay: float,
    is_head: Callable[[str], bool],
) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, biases and norms do not; the head learns faster."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_head(name), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "initial_lr": learning_rate * (head_multiplier if head else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def rate(progress: float, warmup: float) -> float:
    """The learning rate's factor at `progress` 0..1: linear to 1, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Ctrl-C waits until the block is through: an optimizer step is whole, or not done at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending and callable(previous):
        previous(signal.SIGINT, None)


def clock(seconds: float) -> str:
    """'45s', '1m20s', '2h05m'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
