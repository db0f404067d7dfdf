"""The steps of few-step sampling, as a recipe names them."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from annotated_types import MinLen

from moedistill.components.fields import Fraction, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from moedistill.flow.trajectory import Trajectory


@dataclass(kw_only=True)
class SampleConfig:
    """The noise levels at which the student samples, in exactly one unit; 0 follows the last of itself.

    Args:
        points: trajectory points, descending.
        sigmas: noise levels, descending.
        timesteps: the model's native times, descending.
        steps: n points spaced evenly over the trajectory, p_{N - floor(k·N/n)}, k = 0 … n - 1; a student's over the
            phases that its experts are trained on (see `moedistill.flow.phases.spread`).
        eta: how much of each level's noise is drawn anew (see `moedistill.sample`): 0 for none, 1 for all.
    """

    points: Annotated[list[PositiveInt], MinLen(1)] | None = None
    sigmas: Annotated[list[Fraction], MinLen(1)] | None = None
    timesteps: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None
    steps: PositiveInt | None = None
    eta: Fraction = 0.0

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None and name != "eta"]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of points, sigmas, timesteps and steps, not {' and '.join(given) or 'none'}"
            )

    def resolve(
        self, trajectory: "Trajectory", edges: Collection[int] = (), boundaries: Collection[int] = ()
    ) -> "Tensor":
        """The sigmas for `sampling.sample`, float32 `[n + 1]`, strictly descending, the last one 0.

        A sigma or native time close to a trajectory point (`Trajectory.nearest`) means that point. `steps` are spread
        over the phases with these lower edges, as points, and the experts that meet at these boundaries.

        Raises:
            ValueError: a value outside the trajectory, or values that don't descend.
        """
        import torch

        sigmas = [sigma for sigma, _ in self._resolved(trajectory, edges, boundaries)]
        return torch.tensor([*sigmas, 0.0], dtype=torch.float32)

    def notes(self, trajectory: "Trajectory") -> list[str]:
        """How values were understood that were not given as points."""
        return [note for _, note in self._resolved(trajectory) if note]

    def _resolved(
        self, trajectory: "Trajectory", edges: Collection[int] = (), boundaries: Collection[int] = ()
    ) -> list[tuple[float, str]]:
        values = self._values(trajectory, edges, boundaries)
        sigmas = [sigma for sigma, _ in values]
        if not sigmas:
            raise ValueError("there must be at least one step; give at least one value")
        for above, below in pairwise(sigmas):
            if not above > below:
                raise ValueError(f"values must descend strictly, but sigma {above:.6g} is followed by {below:.6g}")
        if sigmas[-1] <= 0:
            raise ValueError("no step can start at sigma 0; it follows the last value of itself")
        return values

    def _values(
        self, trajectory: "Trajectory", edges: Collection[int], boundaries: Collection[int]
    ) -> list[tuple[float, str]]:
        from moedistill.flow.process import as_sigma, listed, operand, whole

        if self.steps is not None:
            from moedistill.flow.phases import spread

            points = spread(edges, trajectory.num_steps, whole("steps", self.steps), boundaries)
            return [(trajectory.sigma(point), "") for point in points]
        if self.points is not None:
            return [(trajectory.sigma(point), "") for point in listed("points", self.points)]
        if self.timesteps is not None:
            times = _without_end([operand("timestep", t).item() for t in listed("timesteps", self.timesteps)])
            return [_near_point(f"timestep {t:g}", trajectory.sigma_of_timestep(t), trajectory) for t in times]
        sigmas = _without_end([as_sigma(sigma) for sigma in listed("sigmas", self.sigmas)])
        return [_near_point(f"sigma {sigma:g}", sigma, trajectory) for sigma in sigmas]


def _without_end(values: list[float]) -> list[float]:
    """Values without the final 0, which some write and some don't."""
    return values[:-1] if len(values) > 1 and values[-1] == 0 else values


def _near_point(what: str, sigma: float, trajectory: "Trajectory") -> tuple[float, str]:
    trajectory.bracket(sigma)  # raises outside [0, 1]
    try:
        point = trajectory.nearest(sigma)
    except ValueError:
        return sigma, f"sample {what} is near no trajectory point: used as it is"
    return trajectory.sigma(point), f"sample {what} means point {point} (sigma {trajectory.sigma(point):.6f})"
