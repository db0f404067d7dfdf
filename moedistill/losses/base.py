"""Losses of the core, and the contracts of plain and adversarial losses.

A loss knows nothing of models: tensors in, float32 scalar out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from moedistill.components.fields import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat
from moedistill.losses.optim import OptimizerConfig, Schedule, ramp

if TYPE_CHECKING:
    from torch import nn

    from moedistill.flow.trajectory import Segment


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance `mean(sqrt(d² + c²) - c)`, d = prediction - target, over all elements (arXiv 2310.14189).

    Quadratic for |d| well below c, linear well above. The tensors have the same shape; the scalar is float32.
    """
    return pseudo_huber_of(difference_of(prediction, target), c)


def pseudo_huber_of(difference: Tensor, c: float = 1e-3) -> Tensor:
    """`pseudo_huber` of a difference `prediction - target` that is already there."""
    if not c > 0:
        raise ValueError(f"c {c} must be positive: it is where the loss turns from quadratic to linear")
    square = at_least_float32(difference).square()
    # Equal to sqrt(d² + c²) - c, without its cancellation at small d.
    return (square / (torch.sqrt(square + c * c) + c)).mean().to(torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` as float32, or as it is when float64: the dtype that losses compute in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def difference_of(prediction: Tensor, target: Tensor) -> Tensor:
    """`prediction - target` in the dtype that losses compute in; ValueError unless their shapes are the same."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape: "
            "they must be the same"
        )
    return at_least_float32(prediction) - at_least_float32(target)


@dataclass(frozen=True)
class ProbeLayout:
    """What a loss needs to know of the probe before it sees one: how many blocks are tapped, and their width."""

    num_taps: int
    hidden_size: int


class ProbeFeatures(Protocol):
    """What a loss sees of the probe: teacher features of the re-noised prediction and target, per tap.

    Attributes:
        hidden_prediction, hidden_target: block outputs, each `[B, T'·H'·W', hidden_size]`, in the blocks' own dtype; a
            loss computes in float32 (`at_least_float32`, `difference_of`).
        hidden_data: the same of the re-noised data, for losses with `needs_data_probe`.
        latent_prediction, latent_target: the same through the teacher's final layers, each `[B, C, T, H, W]`.
        grid: the (T', H', W') of the tokens.
    """

    @property
    def hidden_prediction(self) -> Sequence[Tensor]: ...
    @property
    def hidden_target(self) -> Sequence[Tensor]: ...
    @property
    def hidden_data(self) -> Sequence[Tensor]: ...
    @property
    def latent_prediction(self) -> Sequence[Tensor]: ...
    @property
    def latent_target(self) -> Sequence[Tensor]: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    def detached(self) -> "ProbeFeatures": ...


@dataclass(eq=False)
class StepTensors:
    """All that a loss may look at in one step.

    Attributes:
        prediction: where the student's jump lands, `[B, C, T, H, W]`.
        target: what it should have landed on, same shape, without gradient.
        difference: prediction - target, formed from velocities: the two are nearly equal, and subtracting them would
            lose three digits.
        sigma: where the jump started, `[B]` float32.
        segment: the segment being trained, if there is one.
        probe: teacher features, in stages that compute them.
    """

    prediction: Tensor
    target: Tensor
    difference: Tensor
    sigma: Tensor
    segment: "Segment | None" = None
    probe: ProbeFeatures | None = None

    def detached(self) -> "StepTensors":
        """The same without gradients to the student: what a critic learns from."""
        return StepTensors(
            prediction=self.prediction.detach(),
            target=self.target.detach(),
            difference=self.difference.detach(),
            sigma=self.sigma.detach(),
            segment=self.segment,
            probe=None if self.probe is None else self.probe.detached(),
        )


class Loss(ABC):
    """One term of a stage's objective."""

    @abstractmethod
    def __call__(self, tensors: StepTensors) -> Tensor:
        """The unweighted term: a float32 scalar."""


class AdversarialLoss(Loss):
    """A loss with weights of its own, the critic, trained in turn with the student.

    Attributes:
        critic: the module that owns those weights. `__call__`, the student's term, must leave no gradient on them.
        critic_updates: critic steps per student step.
        optimizer: how the critic is trained.
    """

    critic: "nn.Module"
    critic_updates: int
    optimizer: OptimizerConfig

    @abstractmethod
    def critic_loss(self, critic: "nn.Module", tensors: StepTensors) -> Tensor:
        """The critic's objective on detached tensors: a float32 scalar.

        `critic` is `self.critic`, possibly wrapped (DDP): call this one, and only once.
        """


@dataclass(kw_only=True)
class LossConfig(Config, ABC):
    """Recipe keys common to all losses.

    Args:
        weight: factor of the term in the objective.
        start: first optimiser step at which the term counts.
        warmup: optimiser steps over which the weight rises, from `start` on.
        schedule: what the weight does afterwards: stay, or fall to 0 at the stage's end.
    """

    needs_probe: ClassVar[bool] = False
    """Whether the loss reads `StepTensors.probe`: the stage must then have one."""

    @property
    def needs_data_probe(self) -> bool:
        """Whether the loss reads `ProbeFeatures.hidden_data`, which costs another forward pass of the teacher."""
        return False

    weight: NonNegativeFloat = 1.0
    start: NonNegativeInt = 0
    warmup: NonNegativeInt = 0
    schedule: Schedule = "constant"

    def weight_at(self, step: int, steps: int) -> float:
        """The weight at optimiser step `step` of `steps`; 0 before `start`."""
        if step < self.start:
            return 0.0
        return self.weight * ramp(self.schedule, self.warmup, step - self.start, steps - self.start)

    @abstractmethod
    def build(self, layout: ProbeLayout | None) -> Loss:
        """The loss; `layout` is None in a stage without a probe."""


class Huber(Loss):
    """Pseudo-Huber distance of prediction and target."""

    def __init__(self, c: float) -> None:
        self.c = c

    def __call__(self, tensors: StepTensors) -> Tensor:
        return pseudo_huber_of(tensors.difference, self.c)


@dataclass(kw_only=True)
class HuberConfig(LossConfig):
    """Pseudo-Huber distance `mean(sqrt(d² + c²) - c)` of prediction and target.

    Args:
        c: where it turns from quadratic to linear.
    """

    c: PositiveFloat = 1e-3

    def build(self, layout: ProbeLayout | None) -> Loss:
        return Huber(self.c)


class MSE(Loss):
    """Mean squared distance of prediction and target."""

    def __call__(self, tensors: StepTensors) -> Tensor:
        return at_least_float32(tensors.difference).square().mean().to(torch.float32)


@dataclass(kw_only=True)
class MSEConfig(LossConfig):
    """Mean squared distance `mean(d²)` of prediction and target."""

    def build(self, layout: ProbeLayout | None) -> Loss:
        return MSE()
