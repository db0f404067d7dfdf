"""The discretised probability-flow ODE: its points, segments of it, and the units in which people name a point."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeVar

import torch
from torch import Tensor

from moedistill.components.fields import Config, Fraction, GridSize, PositiveFloat
from moedistill.flow.process import as_sigma, listed, operand, whole
from moedistill.flow.process import shift as shift_time

End = Literal["grid_min", "zero"]
Closed = Literal["low", "high"]
"""Where a sigma equal to a boundary belongs: to the segment below it (`low`), or above it (`high`)."""
Value = TypeVar("Value", float, Tensor)
"""A number or a tensor of any shape; what comes in as a number goes out as one."""

NEAR = 0.25
"""A sigma within this fraction of the gap that it lies in means the nearest point."""


@dataclass(frozen=True)
class Segment:
    """A range of noise levels that belongs to one expert.

    `sigma in segment` compares in float32.

    Args:
        expert: whose it is.
        low, high: its ends. A student trained on the segment lands on `low`.
        closed: `low`: the range is `(low, high]`; `high`: `[low, high)`, and the top segment includes 1.
    """

    expert: str
    low: float
    high: float
    closed: Closed = "low"

    def __post_init__(self) -> None:
        check_closed(self.closed)
        if not isinstance(self.expert, str) or not self.expert:
            raise ValueError(f"segment of {self.expert!r}: an expert's name must be a string that is not empty")
        if not as_sigma(self.low) < as_sigma(self.high):
            raise ValueError(f"segment of {self.expert!r} is empty: low {self.low} must be below high {self.high}")

    def __contains__(self, sigma: float) -> bool:
        value, low, high = as_sigma(sigma), as_sigma(self.low), as_sigma(self.high)
        if self.closed == "low":
            return low < value <= high
        return low <= value < high or value == high == 1.0


def check_closed(closed: str) -> None:
    """ValueError for anything but `low` and `high`."""
    if closed not in ("low", "high"):
        raise ValueError(f"closed {closed!r} is unknown: a boundary value belongs below (low) or above (high)")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Points `p_0 < p_1 < … < p_N = 1` between which the sampler takes N Euler steps, from p_N down.

    `p_0` is where training ends (the smallest sigma of the training grid, or 0); no step starts there.

    Args:
        points: sigmas `[N + 1]`, strictly ascending, the last exactly 1. Kept as float32 on the CPU.
        num_train_timesteps: native times of a flow model are `num_train_timesteps · sigma`.
        shift: of the grid, where there is one. It gives the unshifted time u a meaning.
        native_sigmas: a model's own table, ascending to exactly 1, entry k for native time k. Given, native times are
            read from it, by piecewise-linear interpolation.

    Raises:
        ValueError: points or table out of order or out of [0, 1], or a point without a native time.
    """

    points: Tensor
    num_train_timesteps: int = 1000
    shift: float | None = None
    native_sigmas: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _ascending("points", self.points))
        whole("num_train_timesteps", self.num_train_timesteps)
        if self.shift is not None:
            _check_shift(self.shift)
        if self.native_sigmas is None:
            return
        object.__setattr__(self, "native_sigmas", _ascending("native_sigmas", self.native_sigmas))
        object.__setattr__(self, "num_train_timesteps", len(self.native_sigmas))
        smallest = self.points[self.points > 0][0].item()
        if smallest < self.native_sigmas[0]:
            raise ValueError(
                f"point with sigma {smallest:.6g} has no native time: the model's table starts at sigma "
                f"{self.native_sigmas[0].item():.6g}; start there, or at exactly 0"
            )

    @classmethod
    def flow_matching(
        cls,
        num_steps: int = 50,
        shift: float = 17.0,
        num_train_timesteps: int = 1000,
        end: End = "grid_min",
        *,
        native_sigmas: Tensor | None = None,
    ) -> "Trajectory":
        """The shifted flow-matching grid of DCM (arXiv 2506.03123): `g(u) = shift·u / (1 + (shift - 1)·u)`.

        `p_i = g(i / num_steps)`, and `p_0 = g(1 / num_train_timesteps)`, the smallest sigma of the training grid, or
        exactly 0 with `end="zero"`.
        """
        whole("num_steps", num_steps)
        whole("num_train_timesteps", num_train_timesteps)
        _check_shift(shift)
        if end not in ("grid_min", "zero"):
            raise ValueError(f"end {end!r} is unknown: use grid_min or zero")
        if end == "grid_min" and num_steps >= num_train_timesteps:
            raise ValueError(
                f"num_steps {num_steps} must be below num_train_timesteps {num_train_timesteps}, "
                "where the first point lies; take fewer steps, or end: zero"
            )
        # In float32 throughout, as the models' own schedulers compute it: the points are theirs bit for bit. (Rounding
        # the exact value once differs in the last digit for a third of the points, and a boundary compares exactly.)
        u = torch.arange(num_steps + 1, dtype=torch.float32, device="cpu") / num_steps
        u[0] = 1 / num_train_timesteps if end == "grid_min" else 0.0
        points = shift_time(u, shift)
        points[-1] = 1.0  # which rounding misses for a shift such as 0.4
        return cls(points, num_train_timesteps, shift, native_sigmas)

    @classmethod
    def native(cls, native_sigmas: Tensor, num_steps: int = 50) -> "Trajectory":
        """Every (len / num_steps)-th entry of a model's table: `p_0` its first, `p_i = table[floor(i·len/N) - 1]`."""
        native_sigmas = _ascending("native_sigmas", native_sigmas)
        if not 1 <= whole("num_steps", num_steps) <= len(native_sigmas) // 2:
            raise ValueError(
                f"num_steps {num_steps} does not fit the model's table of {len(native_sigmas)} sigmas: "
                f"use 1 to {len(native_sigmas) // 2}"
            )
        indices = [0] + [i * len(native_sigmas) // num_steps - 1 for i in range(1, num_steps + 1)]
        return cls(native_sigmas[indices], native_sigmas=native_sigmas)

    @classmethod
    def from_sigmas(
        cls, points: Sequence[float] | Tensor, *, num_train_timesteps: int = 1000, native_sigmas: Tensor | None = None
    ) -> "Trajectory":
        """The given points, ascending, the last exactly 1."""
        return cls(_ascending("points", points), num_train_timesteps, native_sigmas=native_sigmas)

    @property
    def num_steps(self) -> int:
        """N, the number of Euler steps."""
        return len(self.points) - 1

    def sigma(self, point: int) -> float:
        """Sigma of a point, exactly the float32 value; ValueError if there is no such point."""
        if isinstance(point, bool) or not isinstance(point, Integral):
            raise ValueError(
                f"point {point!r} must be a whole number, from 0 to {self.num_steps}; a noise level is given as a sigma"
            )
        if not 0 <= point <= self.num_steps:
            raise ValueError(f"point {point} does not exist: the trajectory has points 0 to {self.num_steps}")
        return self.points[point].item()

    def bracket(self, sigma: float) -> tuple[int, int]:
        """The neighbours `(lower, upper)` with `p_lower < sigma <= p_upper`; lower is -1 where no point is below."""
        upper = bisect_left(self.points.tolist(), as_sigma(sigma))
        return upper - 1, upper

    def steps_at(self, sigma: Tensor) -> Tensor:
        """Which of the N steps pass `sigma` `[B]`, int64 `[B]`: 0 is the first, from p_N; below p_0 it is the last."""
        above = torch.searchsorted(self.points.to(sigma.device), sigma)
        return (self.num_steps - above).clamp(0, self.num_steps - 1)

    def nearest(self, sigma: float) -> int:
        """The point that a rounded `sigma` means.

        Below p_0 the gap reaches down to 0, which is itself no point of a `grid_min` trajectory.

        Raises:
            ValueError: the nearest point is farther than a quarter of the gap between the two neighbours.
        """
        value = as_sigma(sigma)
        lower, upper = self.bracket(value)
        below, above = self.sigma(lower) if lower >= 0 else 0.0, self.sigma(upper)
        if above - value <= NEAR * (above - below):
            return upper
        if lower >= 0 and value - below <= NEAR * (above - below):
            return lower
        neighbour = f"point {lower} (sigma {below:.6g})" if lower >= 0 else "sigma 0, which is no point,"
        raise ValueError(
            f"sigma {value:.6g} means no point of the trajectory: it lies between {neighbour} and "
            f"point {upper} (sigma {above:.6g}), farther than a quarter of the gap from both; name a point"
        )

    def timestep(self, sigma: Value) -> Value:
        """Native time of `sigma`: `num_train_timesteps · sigma`, or by the model's table, where sigma 0 has time 0.

        Raises:
            ValueError: sigma is outside [0, 1], or above 0 but below the table's first value.
        """
        x = operand("sigma", sigma)
        _check_range("sigma", x, 1.0)
        if self.native_sigmas is None:
            return _result(self.num_train_timesteps * x, sigma)
        table = self.native_sigmas.to(x.device, x.dtype)
        if bool(((x > 0) & (x < table[0])).any()):
            raise ValueError(
                f"sigma {x[x > 0].min().item():.6g} has no native time: the model's table starts at sigma "
                f"{table[0].item():.6g} (sigma 0 is allowed)"
            )
        above = torch.searchsorted(table, x).clamp(1, len(table) - 1)
        times = above - 1 + (x - table[above - 1]) / (table[above] - table[above - 1])
        return _result(torch.where(x == 0, 0.0, times), sigma)

    def sigma_of_timestep(self, timestep: Value) -> Value:
        """Sigma of a native time, the inverse of `timestep`; ValueError beyond the last native time."""
        t = operand("timestep", timestep)
        if self.native_sigmas is None:
            _check_range("timestep", t, self.num_train_timesteps)
            return _result(t / self.num_train_timesteps, timestep)
        table = self.native_sigmas.to(t.device, t.dtype)
        _check_range("timestep", t, len(table) - 1)
        below = t.floor().long().clamp(max=len(table) - 2)
        return _result(torch.lerp(table[below], table[below + 1], t - below), timestep)

    def shifted(self, u: Value) -> Value:
        """Sigma of an unshifted time in [0, 1]: `shift·u / (1 + (shift - 1)·u)`.

        Raises:
            ValueError: the grid has no shift, or u is outside [0, 1].
        """
        x = operand("u", u)
        _check_range("u", x, 1.0)
        return _result(shift_time(x, self._known_shift()), u)

    def unshift(self, sigma: Value) -> Value:
        """The unshifted time u of `sigma`, the inverse of `shifted`; ValueError as there."""
        x = operand("sigma", sigma)
        _check_range("sigma", x, 1.0)
        return _result(shift_time(x, 1 / self._known_shift()), sigma)

    def points_in(self, segment: Segment) -> range:
        """The points at which a step of `segment` may start: those in it, p_0 never among them."""
        inside = [i for i, sigma in enumerate(self.points.tolist()) if i > 0 and sigma in segment]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _known_shift(self) -> float:
        if self.shift is None:
            raise ValueError("the trajectory has no shift: only flow_matching grids know an unshifted time")
        return self.shift


@dataclass(kw_only=True)
class TrajectoryConfig(Config, ABC):
    """Recipe keys of a trajectory."""

    @abstractmethod
    def build(self, native_sigmas: Tensor | None = None) -> Trajectory:
        """The trajectory; `native_sigmas` is the backbone's own table, where it has one."""

    def settled(self, shift: Callable[[], float | None]) -> "TrajectoryConfig":
        """The same with what is left to the backbone written out: `shift()` is its own for the recipe's videos, if any.

        Raises:
            ValueError: it is left to a backbone that has none.
        """
        return self


@dataclass(kw_only=True)
class FlowMatching(TrajectoryConfig):
    """A shifted flow-matching grid: `p_i = g(i / num_steps)`, `g(u) = shift·u / (1 + (shift - 1)·u)`.

    Args:
        num_steps: number of Euler steps N of the teacher.
        shift: 1 for an even grid; larger values put more points at high noise. `auto`: the model's own for videos of
            the backbone's size, where it has one; the recipe is resolved to that number.
        num_train_timesteps: size of the model's training grid.
        end: `grid_min`: p_0 is the smallest sigma of the training grid, as in DCM; `zero`: p_0 is 0, so that what is
            trained is what is sampled.
    """

    num_steps: GridSize = 50
    shift: PositiveFloat | Literal["auto"] = 17.0
    num_train_timesteps: GridSize = 1000
    end: End = "grid_min"

    def settled(self, shift: Callable[[], float | None]) -> "FlowMatching":
        if self.shift != "auto":
            return self
        if (own := shift()) is None:
            raise ValueError("shift: auto: the backbone gives no shift of its own; give a number, such as 17.0")
        return self.replace(shift=own)

    def build(self, native_sigmas: Tensor | None = None) -> Trajectory:
        if isinstance(self.shift, str):
            raise ValueError("shift: auto becomes a number when a recipe is read; use load_recipe, or give a number")
        return Trajectory.flow_matching(
            self.num_steps, self.shift, self.num_train_timesteps, self.end, native_sigmas=native_sigmas
        )


@dataclass(kw_only=True)
class Native(TrajectoryConfig):
    """Evenly spaced entries of the backbone's own sigma table.

    Args:
        num_steps: number of Euler steps N of the teacher.
    """

    num_steps: GridSize = 50

    def build(self, native_sigmas: Tensor | None = None) -> Trajectory:
        if native_sigmas is None:
            raise ValueError("the backbone has no sigma table of its own: use kind: flow_matching")
        return Trajectory.native(native_sigmas, self.num_steps)


@dataclass(kw_only=True)
class Points(TrajectoryConfig):
    """The points themselves.

    Args:
        sigmas: strictly ascending; the first is where training ends, the last is 1.
    """

    sigmas: list[Fraction]

    def build(self, native_sigmas: Tensor | None = None) -> Trajectory:
        return Trajectory.from_sigmas(self.sigmas, native_sigmas=native_sigmas)


def _check_shift(shift: float) -> None:
    if isinstance(shift, bool) or not isinstance(shift, Real) or not 0 < shift < float("inf"):
        raise ValueError(f"shift {shift!r} must be a positive number")


def _ascending(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """A float32 copy on the CPU; ValueError unless strictly ascending from 0 or more to exactly 1."""
    sigmas = values if isinstance(values, Tensor) else operand(name, listed(name, values))
    sigmas = sigmas.detach().to("cpu", torch.float32, copy=True)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"{name} of shape {list(sigmas.shape)} must be a list of at least two sigmas")
    # Written so that NaN fails too.
    if not bool((sigmas[1:] > sigmas[:-1]).all()):
        i = int((~(sigmas[1:] > sigmas[:-1])).nonzero()[0])
        raise ValueError(
            f"{name} must ascend strictly, but entry {i} is {sigmas[i].item():.7g} "
            f"and entry {i + 1} is {sigmas[i + 1].item():.7g} (in float32)"
        )
    if sigmas[0] < 0 or sigmas[-1] != 1:
        raise ValueError(
            f"{name} run from {sigmas[0].item():.7g} to {sigmas[-1].item():.7g}: "
            "they must start at 0 or above and end at exactly 1, which is pure noise"
        )
    return sigmas


def _result(result: Tensor, like: Value) -> Value:
    return result if isinstance(like, Tensor) else result.item()


def _check_range(name: str, value: Tensor, top: float) -> None:
    inside = (value >= 0) & (value <= top)
    if not bool(inside.all()):
        raise ValueError(f"{name} {value[~inside].flatten()[0].item():.7g} is outside [0, {top:g}]")
