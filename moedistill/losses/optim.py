"""Optimiser settings and learning-rate schedules: one AdamW for everything that is trained by a name."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from moedistill.components.fields import Decay, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "linear", "cosine"]


def ramp(schedule: Schedule, warmup: int, step: int, steps: int) -> float:
    """Factor in [0, 1] at `step` of `steps`: a linear rise over the first `warmup` steps, then constant, or down to 0.

    The rise reaches 1 at step `warmup`; the fall (`linear`, or half a `cosine`) ends at 0 at step `steps`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Args:
        lr: peak learning rate.
        betas: decay rates of the two moments, below 1.
        weight_decay: decoupled weight decay.
        eps: added to the denominator.
        max_grad_norm: gradients are clipped to this total L2 norm; null for no clipping.
        schedule, warmup: shape of the learning rate over the stage's optimiser steps.
    """

    lr: LearningRate = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-3
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    schedule: Schedule = "constant"
    warmup: NonNegativeInt = 0

    def differs(self, steps: int, others: int, done: int) -> bool:
        """Whether the learning rates of the first `done` steps, and the next, differ between two numbers of steps."""
        if self.schedule == "constant":
            return False
        shape = partial(ramp, self.schedule, self.warmup)
        return any(shape(step, steps) != shape(step, others) for step in range(done + 1))

    def build(self, parameters: "Iterable[nn.Parameter]", steps: int) -> "tuple[AdamW, LambdaLR]":
        """The optimiser over `parameters` and its schedule over `steps` optimiser steps."""
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import LambdaLR

        optimizer = AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps, foreach=False
        )
        return optimizer, LambdaLR(optimizer, lambda step: ramp(self.schedule, self.warmup, step, steps))
