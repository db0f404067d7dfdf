"""Optimiser settings and learning-rate schedules: one AdamW for everything that is trained by a name."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moedistill.components.fields import Decay, LearningRate, NonNegativeFloat, NonNegativeInt, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
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
        states: int8 keeps the moments of tensors with 4096 elements and more in 8 bits, a quarter of the memory.
    """

    lr: LearningRate = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-3
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    schedule: Schedule = "constant"
    warmup: NonNegativeInt = 0
    states: Literal["float32", "int8"] = "float32"

    def differs(self, steps: int, others: int, done: int) -> bool:
        """Whether the learning rates of the first `done` steps, and the next, differ between two numbers of steps."""
        if self.schedule == "constant":
            return False
        shape = partial(ramp, self.schedule, self.warmup)
        return any(shape(step, steps) != shape(step, others) for step in range(done + 1))

    def build(self, parameters: "Iterable[nn.Parameter]", steps: int) -> "tuple[Optimizer, LambdaLR]":
        """The optimiser over `parameters` and its schedule over `steps` optimiser steps.

        Raises:
            ValueError: states are to be int8, and torchao is not installed.
        """
        from torch.optim.lr_scheduler import LambdaLR

        optimizer = self._adamw()(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps
        )
        return optimizer, LambdaLR(optimizer, lambda step: ramp(self.schedule, self.warmup, step, steps))

    def _adamw(self) -> "Callable[..., Optimizer]":
        if self.states == "float32":
            from torch.optim import AdamW

            return partial(AdamW, foreach=False)
        try:
            from moedistill.losses.eight_bit import Int8AdamW
        except ImportError as error:
            raise ValueError(
                f"optimizer.states: int8 needs torchao: pip install 'moedistill[int8]' ({error})"
            ) from error
        return Int8AdamW


def moments_of(optimizer: Any, parameter: "Tensor") -> "Mapping[str, Any]":
    """What an optimiser that `OptimizerConfig` builds keeps of a parameter, but for its `step`.

    Of shapes and dtypes as its state has them; numbers, if there are any, mean nothing.
    """
    bare = getattr(optimizer, "optimizer", optimizer)  # of accelerate's
    moments: Mapping[str, Any] = (
        bare.form_of(parameter) if hasattr(bare, "form_of") else dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
    )
    return moments
