"""Consistency distillation of one expert on its segment of the trajectory: SemE and DetE of DCM, LCM and PCM alike.

DCM: Dual-Expert Consistency Model for Efficient and High-Quality Video Generation, arXiv 2506.03123.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from moedistill.components.fields import NonNegativeInt, PositiveInt
from moedistill.data.loading import Batch
from moedistill.flow.chords import power_at, sampled_power
from moedistill.flow.phases import landing_points, phase_edges, stops_in
from moedistill.flow.process import add_noise, displacement, jump
from moedistill.flow.routers import segment_of
from moedistill.flow.trajectory import Segment, Trajectory
from moedistill.losses.base import ProbeLayout, StepTensors
from moedistill.model.conditioning import Conditioning
from moedistill.recipe.keys import Finding, TrainingStageConfig
from moedistill.recipe.sampling import samples, sampling_sigmas, trajectory_of
from moedistill.stages.base import TrainingStage
from moedistill.stages.monitor import Monitor
from moedistill.stages.training import STUDENT, Training

if TYPE_CHECKING:
    from moedistill.recipe.keys import Recipe


@dataclass(kw_only=True)
class PhasePoints:
    """Where phases meet.

    Args:
        points: their inner edges, as trajectory points; none for a single phase.
    """

    points: list[NonNegativeInt]


@dataclass(kw_only=True)
class ConsistencyConfig(TrainingStageConfig):
    """Distil the teacher's trajectory into jumps to the segment's end.

    Args:
        target: whose velocity makes the target: the `student` itself, or its `ema`.
        phases: cut the segment into this many phases of equal numbers of points, or at given points; a jump lands on
            its phase's lower edge. 1 is LCM and DCM; n is PCM. `sampling` cuts it at the points of `sample`, so that
            every step ends where a jump was trained to land; the recipe is resolved to these points.
    """

    target: Literal["student", "ema"] = "student"
    phases: PositiveInt | Literal["sampling"] | PhasePoints = 1
    steps_may_grow: ClassVar[bool] = True

    def build(self) -> "ConsistencyStage":
        return ConsistencyStage(self)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        yield from super().check(recipe)
        if self.target == "ema" and self.ema_decay is None:
            yield "target", "target: ema needs ema_decay; give one, such as 0.95"
        if self.expert not in (recipe.experts or {}) or recipe.trajectory is None or recipe.backbone is None:
            return
        if self.phases == "sampling" and recipe.sample is None:
            yield "phases", "sampling needs the recipe's sample, at whose points it cuts; give sample: {points: …}"
            return
        try:
            trajectory, segment = self._range(recipe)
            sigmas = sampling_sigmas(recipe).tolist() if self.phases == "sampling" else []
        except ValueError:
            return  # reported elsewhere
        try:
            inner = stops_in(segment, sigmas, trajectory) if self.phases == "sampling" else _inner(self.phases)
            phase_edges(trajectory.points_in(segment), inner)
        except ValueError as error:
            yield "phases", str(error)

    def _range(self, recipe: "Recipe") -> tuple[Trajectory, Segment]:
        """The recipe's trajectory, and the part of it on which the expert is trained."""
        trajectory = trajectory_of(recipe)
        router = recipe.router.build(trajectory) if recipe.router is not None else None
        return trajectory, segment_of(self.expert, router, trajectory)

    def landings(self, recipe: "Recipe") -> list[int]:
        """Lower edges of the phases; of the segment alone while `sampling` is to be resolved."""
        trajectory, segment = self._range(recipe)
        return phase_edges(trajectory.points_in(segment), 1 if self.phases == "sampling" else _inner(self.phases))

    def settled(self, recipe: "Recipe") -> "ConsistencyConfig":
        if self.phases != "sampling":
            return self
        trajectory, segment = self._range(recipe)
        return self.replace(phases=PhasePoints(points=stops_in(segment, sampling_sigmas(recipe).tolist(), trajectory)))

    @classmethod
    def kept_for_sampling(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: saved[key] for key in ("name", "expert", "steps", "phases") if key in saved}
        return {**kept, "losses": [{"kind": "huber"}]}

    def notes(self, recipe: "Recipe") -> Iterable[str]:
        """Where `sample` takes a step that no jump was trained for: short of its phase's end, or beyond it."""
        last = [stage.name for stage in recipe.stages if self.expert in stage.trained_experts()][-1:]
        if recipe.sample is None or recipe.sample.eta > 0 or last != [self.name]:
            return
        trajectory, segment = self._range(recipe)
        if not samples(self.expert, recipe, trajectory):
            return
        landings = [trajectory.sigma(edge) for edge in self.landings(recipe)]

        def landing(sigma: float) -> float:
            return max(end for end in landings if end < sigma)

        # From p_0 and below no jump starts.
        path = [step for step in pairwise(sampling_sigmas(recipe).tolist()) if step[0] > trajectory.sigma(0)]
        steps = [step for step in path if step[0] in segment]
        if inside := [f"{below:.4g}" for above, below in steps if below > landing(above)]:
            walked = [steps[0][0], *(below for _, below in steps)]
            share = sampled_power(walked, landing)[-1] / power_at(walked[-1])
            other = "" if recipe.backbone.has_pipeline else "; `sample.eta: 1` draws the noise of every stop anew"
            yield (
                f"stage {self.name}: sampling stops at sigma {', '.join(inside)} inside a phase, where no jump is "
                f"trained to land; data of variance 1 would leave these steps with {share:.3g} times their variance. "
                f"`phases: sampling` trains what is sampled{other}"
            )
        # Beyond p_0 every list goes on to 0.
        beyond = [step for step in steps if max(step[1], trajectory.sigma(0)) < landing(step[0])]
        if beyond:
            named = ", ".join(
                f"from sigma {above:.4g} to {below:.4g} (ends at {landing(above):.4g})" for above, below in beyond
            )
            yield f"stage {self.name}: sampling goes beyond the end of a phase, where no jump is trained to go: {named}"


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
    alike: bool = False,
) -> Jumps:
    """The student jumps from `sigma` to `end` at once; the teacher steps to `previous`, the target jumps on from there.

    Args:
        x: noisy latents `[B, C, T, H, W]` at `sigma`.
        sigma, previous, end: `[B]`, falling; a jump of zero length, `previous` = `end`, asks the target nothing.
        teacher, target: without gradients.
        alike: ask the target in any case, as processes do that must call it alike.
    """
    # The student jumps to the end at once.
    v_student = student(x, sigma, cond)
    prediction = jump(x, v_student, sigma, end)

    # The teacher takes one step, and the target network jumps on from there.
    v_teacher = teacher(x, sigma, cond)
    x_previous = jump(x, v_teacher, sigma, previous)
    v_target = torch.zeros_like(v_teacher)
    goes_on = previous > end  # a jump of zero length needs no velocity
    if alike or bool(goes_on.any()):
        v_target = torch.where(goes_on.view(-1, 1, 1, 1, 1), target(x_previous, previous, cond), v_target)
    landing = jump(x_previous, v_target, previous, end)

    # Prediction and target are nearly equal: their difference is formed from the velocities.
    difference = (
        displacement(v_student, sigma, end)
        - displacement(v_teacher, sigma, previous)
        - displacement(v_target, previous, end)
    )
    return Jumps(prediction, landing, difference, sigma, end)


def _inner(phases: int | str | PhasePoints) -> int | list[int]:
    if isinstance(phases, str):
        raise ValueError(f"phases: {phases} becomes points when a recipe is read; use load_recipe")
    return phases if isinstance(phases, int) else phases.points


class ConsistencyStage(TrainingStage):
    """See `ConsistencyConfig`."""

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config: ConsistencyConfig = config

    def setup(self, training: Training) -> None:
        config = self.config
        self._starts = training.trajectory.points_in(training.segment)
        self._landings = landing_points(self._starts, _inner(config.phases))
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
            alike=training.mixture.sharded,
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
