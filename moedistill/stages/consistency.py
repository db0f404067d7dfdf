"""Consistency distillation of one expert on its segment of the trajectory: SemE and DetE of DCM, LCM and PCM alike.

DCM: Dual-Expert Consistency Model for Efficient and High-Quality Video Generation, arXiv 2506.03123.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moedistill.components.fields import NonNegativeInt, PositiveInt
from moedistill.data.loading import Batch
from moedistill.flow.process import add_noise, displacement, jump
from moedistill.flow.routers import segment_of
from moedistill.losses.base import ProbeLayout, StepTensors
from moedistill.model.conditioning import Conditioning
from moedistill.recipe.keys import Finding, TrainingStageConfig
from moedistill.stages.base import TrainingStage
from moedistill.stages.monitor import Monitor
from moedistill.stages.training import STUDENT, Training

if TYPE_CHECKING:
    from moedistill.recipe.keys import Recipe


@dataclass(kw_only=True)
class PhasePoints:
    """Inner edges of the phases, as trajectory points."""

    points: list[NonNegativeInt]


@dataclass(kw_only=True)
class ConsistencyConfig(TrainingStageConfig):
    """Distil the teacher's trajectory into jumps to the segment's end.

    Args:
        target: whose velocity makes the target: the `student` itself, or its `ema`.
        phases: cut the segment into this many phases of equal numbers of points, or at given points; a jump lands on
            its phase's lower edge. 1 is LCM and DCM; n is PCM.
    """

    target: Literal["student", "ema"] = "student"
    phases: PositiveInt | PhasePoints = 1

    def build(self) -> "ConsistencyStage":
        return ConsistencyStage(self)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        yield from super().check(recipe)
        if self.target == "ema" and self.ema_decay is None:
            yield "target", "target: ema needs ema_decay; give one, such as 0.95"
        if self.expert not in (recipe.experts or {}) or recipe.trajectory is None or recipe.backbone is None:
            return
        try:
            trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
            router = recipe.router.build(trajectory) if recipe.router is not None else None
            segment = segment_of(self.expert, router, trajectory)
        except ValueError:
            return  # reported elsewhere
        try:
            landing_points(trajectory.points_in(segment), _edges(self.phases))
        except ValueError as error:
            yield "phases", str(error)


def landing_points(starts: range, phases: int | list[int]) -> Tensor:
    """Where the jump from each starting point lands, as a point, int64 `[len(starts)]`.

    `phases` M cuts at starts[0] - 1 + floor(k·n/M), k = 0..M, n = len(starts); a list gives the inner edges themselves.
    A starting point equal to an edge belongs to the phase below it.

    Raises:
        ValueError: more phases than starting points, or an edge outside the segment.
    """
    lowest, n = starts[0] - 1, len(starts)
    if isinstance(phases, int):
        if phases > n:
            raise ValueError(f"phases: {phases} for a segment of {n} points; at most {n} are possible")
        edges = [lowest + k * n // phases for k in range(phases)]
    else:
        outside = [point for point in phases if point not in range(lowest + 1, starts[-1])]
        if outside:
            raise ValueError(
                f"phases.points: {outside[0]} is not inside the segment, whose inner points are "
                f"{lowest + 1} to {starts[-1] - 1}"
            )
        edges = sorted({lowest, *phases})
    return torch.tensor([max(edge for edge in edges if edge < start) for start in starts])


Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""A network as a step calls it: `x` `[B, C, T, H, W]`, `sigma` `[B]` and conditioning to a velocity shaped as `x`."""


@dataclass
class Jumps:
    """Where the student and its target land from the same starting points; sigmas are `[B]`.

    Attributes:
        prediction, target: `[B, C, T, H, W]`, both at `end`; no gradient reaches the target.
        difference: prediction - target, exact where both are nearly equal.
        sigma, end: of the starting points and of the landings.
    """

    prediction: Tensor
    target: Tensor
    difference: Tensor
    sigma: Tensor
    end: Tensor


def jumps(
    x: Tensor,
    cond: Conditioning,
    sigma: Tensor,
    previous: Tensor,
    end: Tensor,
    *,
    student: Velocity,
    teacher: Velocity,
    target: Velocity,
) -> Jumps:
    """The student jumps from `sigma` to `end` at once; the teacher steps to `previous`, the target jumps on from there.

    Args:
        x: noisy latents `[B, C, T, H, W]` at `sigma`.
        sigma, previous, end: `[B]`, falling; a jump of zero length, `previous` = `end`, asks the target nothing.
        teacher, target: without gradients.
    """
    # The student jumps to the end at once.
    v_student = student(x, sigma, cond)
    prediction = jump(x, v_student, sigma, end)

    # The teacher takes one step, and the target network jumps on from there.
    v_teacher = teacher(x, sigma, cond)
    x_previous = jump(x, v_teacher, sigma, previous)
    v_target = torch.zeros_like(v_teacher)
    goes_on = previous > end  # a jump of zero length needs no velocity
    if bool(goes_on.any()):
        v_target = torch.where(goes_on.view(-1, 1, 1, 1, 1), target(x_previous, previous, cond), v_target)
    landing = jump(x_previous, v_target, previous, end)

    # Prediction and target are nearly equal: their difference is formed from the velocities.
    difference = (
        displacement(v_student, sigma, end)
        - displacement(v_teacher, sigma, previous)
        - displacement(v_target, previous, end)
    )
    return Jumps(prediction, landing, difference, sigma, end)


def _edges(phases: int | PhasePoints) -> int | list[int]:
    return phases if isinstance(phases, int) else phases.points


class ConsistencyStage(TrainingStage):
    """See `ConsistencyConfig`."""

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config: ConsistencyConfig = config

    def setup(self, training: Training) -> None:
        config = self.config
        self._starts = training.trajectory.points_in(training.segment)
        self._landings = landing_points(self._starts, _edges(config.phases))
        training.trains(STUDENT, config.expert, config.optimizer, ema=config.ema_decay)
        layout = None
        if config.probe is not None:
            backbone = training.mixture.backbone
            layout = ProbeLayout(len(backbone.blocks[:: config.probe.block_stride]), backbone.hidden_size)
        training.add_losses(config.losses, layout)

    def jumps(self, training: Training, x0: Tensor, cond: Conditioning, i: Tensor, noise: Tensor) -> Jumps:
        """The run's expert and its target from the points `i`, int64 `[B]`, of the segment; see `jumps`."""
        points, land = training.trajectory.points, self._landings[i - self._starts[0]]
        sigma, previous, end = (points[index].to(training.device) for index in (i, i - 1, land))
        return jumps(
            add_noise(x0, noise, sigma),
            cond,
            sigma,
            previous,
            end,
            student=training.velocity,
            teacher=training.teacher,
            target=partial(training.target, ema=self.config.target == "ema"),
        )

    def monitor(self, training: Training) -> Monitor | None:
        config = training.recipe.training.monitor
        if config is None:
            return None

        def miss(x0: Tensor, cond: Conditioning, i: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            made = self.jumps(training, x0, cond, i, noise)
            return made.difference, made.sigma - made.end

        return Monitor(config, training, miss)

    def step(self, training: Training, batch: Batch) -> None:
        x0, cond = batch.latents, batch.conditioning

        # A starting point p_i of the segment, and what the student and its target make of it.
        i = training.draw.integers("point", self._starts[0], self._starts[-1] + 1)
        noise = training.draw.normal("noise", x0.shape[1:])
        made = self.jumps(training, x0, cond, i, noise)

        # Teacher features, once for all losses and the critics.
        probe = None
        if self.config.probe is not None and training.probe_wanted:
            data = x0 if training.data_probe_wanted else None
            probe = training.probe(made.prediction, made.target, made.end, cond, self.config.probe.block_stride, data)

        tensors = StepTensors(made.prediction, made.target, made.difference, made.sigma, training.segment, probe)
        training.update(STUDENT, training.objective(tensors))
        training.update_critics(tensors)
