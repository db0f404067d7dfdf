"""Which expert serves which noise level. Training, sampling and export use the same object."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from moedistill.components.fields import Config, Fraction, NonNegativeFloat, NonNegativeInt
from moedistill.flow.process import as_sigma
from moedistill.flow.trajectory import Closed, Segment, Trajectory, check_closed


@dataclass(frozen=True)
class TimestepRouter:
    """Hard routing by noise level: experts from high to low noise, boundaries between them descending.

    A sigma below `low` still belongs to the last expert: sampling runs on to 0 with it. Sigmas and boundaries are
    compared in float32 and never changed; one boundary per change of expert is all there is.

    Args:
        experts: unique names, from high to low noise.
        boundaries: sigmas, strictly descending, one fewer than experts.
        low: low end of the last segment, where its student lands.
        closed: where a sigma equal to a boundary belongs: `low`, below it; `high`, above it (Wan2.2's convention).
        notes: how boundaries were understood, for people to read.

    Raises:
        ValueError: names or boundaries that don't make one non-empty segment per expert.
    """

    experts: Sequence[str]
    boundaries: Sequence[float] = ()
    low: float = 0.0
    closed: Closed = "low"
    notes: Sequence[str] = field(default=(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.experts, str):
            raise ValueError(f"experts must be a list of names, not the string {self.experts!r}")
        object.__setattr__(self, "experts", tuple(self.experts))
        object.__setattr__(self, "boundaries", tuple(float(b) for b in self.boundaries))
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "notes", list(self.notes))
        check_closed(self.closed)
        _check_experts(self.experts, len(self.boundaries))
        ends = [1.0, *self.boundaries, self.low]
        if any(not as_sigma(above) > as_sigma(below) for above, below in pairwise(ends)):
            raise ValueError(
                f"boundaries {list(self.boundaries)} must descend strictly between 1 and low {self.low}: "
                "they part the experts from high to low noise"
            )

    @classmethod
    def from_points(
        cls, trajectory: Trajectory, experts: Sequence[str], points: Sequence[int], *, closed: Closed = "low"
    ) -> "TimestepRouter":
        """Boundaries as points of `trajectory`, descending; the last segment ends at the trajectory's first point."""
        return cls(experts, [trajectory.sigma(point) for point in points], trajectory.sigma(0), closed)

    @classmethod
    def from_timesteps(
        cls,
        experts: Sequence[str],
        timesteps: Sequence[float],
        num_train_timesteps: int = 1000,
        low: float = 0.0,
        closed: Closed = "low",
    ) -> "TimestepRouter":
        """Boundaries as native times of a flow model, `num_train_timesteps · sigma`, descending."""
        return cls(experts, [timestep / num_train_timesteps for timestep in timesteps], low, closed)

    @classmethod
    def from_ratio(
        cls, experts: Sequence[str], ratios: Sequence[float], low: float = 0.0, closed: Closed = "low"
    ) -> "TimestepRouter":
        """Boundaries as Wan2.2's `boundary_ratio`: a fraction of the *shifted* native time, which is sigma itself.

        Wan2.2 itself sends a time equal to the boundary above: `closed="high"`.
        """
        return cls(experts, ratios, low, closed)

    @classmethod
    def from_snr(
        cls, experts: Sequence[str], snrs: Sequence[float], low: float = 0.0, closed: Closed = "low"
    ) -> "TimestepRouter":
        """Boundaries as signal-to-noise ratios, `((1 - sigma) / sigma)²`, ascending (so that noise descends)."""
        return cls(experts, [sigma_of_snr(snr) for snr in snrs], low, closed)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One segment per expert, from high to low noise."""
        ends = pairwise([1.0, *self.boundaries, self.low])
        return tuple(
            Segment(expert, low, high, self.closed) for expert, (high, low) in zip(self.experts, ends, strict=True)
        )

    def segment(self, expert: str) -> Segment:
        """The segment of `expert`; ValueError if it has none."""
        for segment in self.segments:
            if segment.expert == expert:
                return segment
        raise ValueError(f"no expert {expert!r}: the router knows {', '.join(self.experts)}")

    def expert_at(self, sigma: float | Tensor) -> str:
        """The expert that serves `sigma`, one number; ValueError if it is outside [0, 1] or NaN."""
        value = as_sigma(sigma)
        # The last expert has no boundary below it: it also serves what lies under `low`.
        for expert, boundary in zip(self.experts, self.boundaries, strict=False):
            edge = as_sigma(boundary)
            if value > edge or (value == edge and self.closed == "high"):
                return expert
        return self.experts[-1]

    def experts_at(self, sigmas: Tensor | Sequence[float]) -> list[str]:
        """The expert of each sample, for sigmas `[B]`; ValueError if one is outside [0, 1] or NaN."""
        if isinstance(sigmas, Tensor):
            if sigmas.ndim != 1:
                raise ValueError(f"sigmas of shape {list(sigmas.shape)} must be [B], one per sample")
            sigmas = sigmas.tolist()
        return [self.expert_at(sigma) for sigma in sigmas]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: what `from_dict` reads."""
        return {
            "kind": "timestep",
            "experts": list(self.experts),
            "boundaries": list(self.boundaries),
            "low": self.low,
            "closed": self.closed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TimestepRouter":
        """The router that `to_dict` described; ValueError if `data` describes something else."""
        keys = {"kind", "experts", "boundaries", "low", "closed"}
        if set(data) != keys or data["kind"] != "timestep":
            raise ValueError(f"not a timestep router: {dict(data)!r}; expected kind 'timestep' and keys {sorted(keys)}")
        return cls(data["experts"], data["boundaries"], data["low"], data["closed"])


def sigma_of_snr(snr: float) -> float:
    """Sigma at a signal-to-noise ratio `((1 - sigma) / sigma)²`: `1 / (1 + sqrt(snr))`."""
    if not snr >= 0:
        raise ValueError(f"snr {snr} must be 0 or above")
    return 1.0 / (1.0 + math.sqrt(snr))


@dataclass(kw_only=True)
class Boundary:
    """One boundary between two experts, in exactly one unit.

    Args:
        point: index of a trajectory point.
        sigma: noise level in [0, 1].
        timestep: the model's native time; for flow models num_train_timesteps · sigma.
        ratio: Wan2.2's `boundary_ratio`, a fraction of the shifted native time: the same number as sigma.
        snr: signal-to-noise ratio ((1 - sigma) / sigma)².
    """

    point: NonNegativeInt | None = None
    sigma: Fraction | None = None
    timestep: NonNegativeFloat | None = None
    ratio: Fraction | None = None
    snr: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            raise ValueError(
                f"a boundary needs exactly one of point, sigma, timestep, ratio, snr, but has {self._given() or 'none'}"
            )

    def resolve(self, trajectory: Trajectory, closed: Closed = "low") -> tuple[int, str | None]:
        """The trajectory point that the boundary means, and a note where it was not given as a point.

        Within a quarter of the gap of a point it means that point. Elsewhere it is the next point below
        (`closed="low"`) or above (`"high"`), which routes every point of the trajectory as the value would.
        """
        if self.point is not None:
            trajectory.sigma(self.point)
            return self.point, None
        sigma = self._sigma(trajectory)
        lower, upper = trajectory.bracket(sigma)
        try:
            point, how = trajectory.nearest(sigma), "means"
        except ValueError:
            point, how = (lower if closed == "low" else upper), f"lies between points {lower} and {upper}: taken as"
        [(unit, value)] = self._given().items()
        if point < 0:
            raise ValueError(
                f"boundary {unit} {value:g} lies below the trajectory's first point (sigma {trajectory.sigma(0):.6g})"
            )
        return point, f"boundary {unit} {value:g} {how} point {point} (sigma {trajectory.sigma(point):.6f})"

    def _given(self) -> dict[str, float]:
        return {unit: value for unit, value in vars(self).items() if value is not None}

    def _sigma(self, trajectory: Trajectory) -> float:
        if self.timestep is not None:
            return trajectory.sigma_of_timestep(float(self.timestep))
        if self.snr is not None:
            return sigma_of_snr(self.snr)
        [sigma] = self._given().values()
        return sigma


@dataclass(kw_only=True)
class RouterConfig(Config, ABC):
    """Recipe keys of a router."""

    @abstractmethod
    def build(self, trajectory: Trajectory) -> TimestepRouter:
        """The router over the segments of `trajectory`; its `notes` tell how boundaries were understood."""


@dataclass(kw_only=True)
class TimestepRouterConfig(RouterConfig):
    """Hard routing by noise level.

    Args:
        experts: names, from high to low noise.
        boundaries: one fewer than experts, from high to low noise. Each is resolved once, to a trajectory point.
        closed: where the boundary point itself belongs: `low`, to the expert below; `high`, above, as in Wan2.2.
    """

    experts: list[str]
    boundaries: list[Boundary] = field(default_factory=list)
    closed: Closed = "low"

    def __post_init__(self) -> None:
        _check_experts(self.experts, len(self.boundaries))

    def build(self, trajectory: Trajectory) -> TimestepRouter:
        resolved = [boundary.resolve(trajectory, self.closed) for boundary in self.boundaries]
        points = [point for point, _ in resolved]
        if any(not above > below for above, below in pairwise([trajectory.num_steps, *points, 0])):
            raise ValueError(
                f"boundaries mean points {points}: they must descend strictly, between {trajectory.num_steps} and 0"
            )
        router = TimestepRouter(
            self.experts,
            [trajectory.sigma(point) for point in points],
            trajectory.sigma(0),
            self.closed,
            notes=[note for _, note in resolved if note is not None],
        )
        for segment in router.segments:
            if not trajectory.points_in(segment):
                raise ValueError(
                    f"expert {segment.expert!r} has no trajectory point in its segment, sigma {segment.low:.6g} to "
                    f"{segment.high:.6g}, closed: {self.closed}; move a boundary"
                )
        return router


def _check_experts(experts: Sequence[str], num_boundaries: int) -> None:
    if not experts or not all(isinstance(expert, str) and expert for expert in experts):
        raise ValueError(f"experts {list(experts)} must be at least one non-empty name")
    if len(set(experts)) != len(experts):
        raise ValueError(f"experts {list(experts)} must differ: an expert serves one segment")
    if num_boundaries != len(experts) - 1:
        raise ValueError(f"{len(experts)} experts need {len(experts) - 1} boundaries, not {num_boundaries}")
