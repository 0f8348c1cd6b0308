"""A layer that computes with the weight that will be stored, while the float one learns.

Forward is the packer's rounding (`affine.py`), backward the straight-through estimator. Scales are
fixed, the packer's choice for the weight at the start, or learn too: LSQ, Esser et al. 2020,
https://arxiv.org/abs/1902.08153. A learned scale is the first one times exp(u), brought to the
values that a checkpoint stores (`affine.canonical`) before any integer is chosen, in each step; so
the integers are always the nearest ones for the scale that is stored. With

    v(w, s) = s (clamp(round(w / s) + z) - z):   dv/dw = 1 inside, 0 where clipped
                                                 dv/du = v - w inside, v where clipped

where rounding, of integers and of scales, counts as the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import canonical
from pocketglm.ops.fake_quant import rounded_weight

LEARNED = "log_factor"  # the name of the parameter with which scales learn


class FakeWeight(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) of a weight [N, K] in a scheme.

    scales [N, G], zero_points int8 [N, G]: where training begins; zero points stay. learned: the
    scales learn.
    """

    def __init__(
        self,
        scheme: TensorScheme,
        scales: Tensor,
        zero_points: Tensor | None = None,
        *,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("first", scales, persistent=False)
        self.register_buffer("zero_points", zero_points, persistent=False)
        # One-dimensional: the optimizer lets matrices decay.
        factor = nn.Parameter(torch.zeros(scales.numel(), device=scales.device))
        self.log_factor: nn.Parameter | None = factor if learned else None
        self.keeps = False  # see `rounded_once`
        self.kept: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def scales(self) -> Tensor:
        """As they are stored: float32 [N, G]."""
        first = cast(Tensor, self.first)
        if self.log_factor is None:
            return first
        return canonical(first * self.log_factor.exp().view_as(first))

    def forward(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N, K], float32."""
        value, inside = self._rounded(weight)
        if not torch.is_grad_enabled():
            return value
        return cast(Tensor, _Rounded.apply(weight, self.log_factor, value, inside))  # type: ignore[no-untyped-call]

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not self.keeps or not isinstance(weight, nn.Parameter):
            return self._round(weight)
        # Values that were made in inference mode cannot be trained with.
        state = weight._version, weight.data_ptr(), torch.is_inference_mode_enabled()
        if self.kept is None or self.kept[0] != state:
            self.kept = None  # two at once would be twice the memory
            self.kept = state, self._round(weight)
        return self.kept[1]

    @torch.no_grad()
    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        zeros = cast(Tensor | None, self.zero_points)
        return rounded_weight(weight.detach().float(), self.scheme, self.scales(), zeros)


class _Rounded(torch.autograd.Function):
    """Gives `value`; its gradient goes to the weight where `inside`, and to log_factor."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factor: Tensor | None, value: Tensor, inside: Tensor
    ) -> Tensor:
        ctx.learned = factor is not None and factor.requires_grad
        ctx.dtype, ctx.shape = weight.dtype, None if factor is None else factor.shape
        ctx.save_for_backward(inside, *((weight, value) if ctx.learned else ()))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, *more = ctx.saved_tensors
        of_weight = (gradient * inside).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_factor = None
        if ctx.learned:
            weight, value = more
            error = (value - weight * inside).mul_(gradient)
            of_factor = error.view(ctx.shape[0], -1).sum(1)
        return of_weight, of_factor, None, None


@contextmanager
def rounded_once(fakes: Iterable[FakeWeight]) -> Iterator[None]:
    """Meanwhile each of them rounds its parameter once, until an optimizer makes a step (or the
    parameter is loaded): a tied embedding is read several times in one, and validation changes
    nothing. A parameter's version does not tell: fused AdamW leaves it as it is.
    """
    chosen = list(fakes)

    def forget(*_: Any) -> None:
        for fake in chosen:
            fake.kept = None

    handle = register_optimizer_step_post_hook(forget)
    for fake in chosen:
        fake.keeps = True
    try:
        yield
    finally:
        handle.remove()
        forget()
        for fake in chosen:
            fake.keeps = False
