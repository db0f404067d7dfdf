"""Which expert serves which noise level. Training, sampling and export use the same object."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from moedistill.components.fields import Config, Fraction, NonNegativeFloat, NonNegativeInt
from moedistill.flow.process import as_sigma, listed, whole
from moedistill.flow.trajectory import Closed, Segment, Trajectory, check_closed


class Router(ABC):
    """Which expert serves which noise level: hard segments from 1 down, one for each expert, which never change.

    A router of one's own says where the boundaries are: it gives `segments`, `to_dict` and `from_dict`, and everything
    else follows. A plain list of boundaries is a `TimestepRouter`. What routes otherwise (softly, by chance, by what a
    network has learned) is no router: each expert is trained on its segment and on nothing else. `moedistill validate`
    refuses it; see `check_router`.

    Attributes:
        notes: how boundaries were understood, for people to read.
    """

    notes: Sequence[str] = ()

    @property
    @abstractmethod
    def segments(self) -> Sequence[Segment]:
        """One segment per expert, from high to low noise: from 1, without gaps, all `closed` alike."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data with a `kind`, for JSON: what `from_dict` reads; "timestep" is what `TimestepRouter` reads."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Router":
        """The router that `to_dict` described; ValueError if `data` describes something else."""

    @cached_property
    def experts(self) -> Sequence[str]:
        """Names, from high to low noise."""
        return tuple(segment.expert for segment in self.segments)

    def segment(self, expert: str) -> Segment:
        """The segment of `expert`; ValueError if it has none."""
        for segment in self.segments:
            if segment.expert == expert:
                return segment
        raise ValueError(f"no expert {expert!r}: the router knows {', '.join(self.experts)}")

    def expert_at(self, sigma: float | Tensor) -> str:
        """The expert that serves `sigma`, one number; ValueError if it is outside [0, 1] or NaN."""
        value, segments = as_sigma(sigma), self.segments
        # The last expert also serves what lies under its segment: sampling runs on to 0 with it.
        return next((segment.expert for segment in segments if value in segment), segments[-1].expert)

    def experts_at(self, sigmas: Tensor | Sequence[float]) -> list[str]:
        """The expert of each sample, for sigmas `[B]`; ValueError if one is outside [0, 1] or NaN."""
        if isinstance(sigmas, Tensor) and sigmas.ndim != 1:
            raise ValueError(f"sigmas of shape {list(sigmas.shape)} must be [B], one per sample")
        return [self.expert_at(sigma) for sigma in listed("sigmas", sigmas)]

    def dispatch(self, sigmas: Tensor | Sequence[float]) -> list[tuple[str, Tensor]]:
        """A mixed batch by expert: pairs (expert, rows), from high to low noise; experts without a sample are left out.

        For loops of one's own: each network is called once, with its rows of the batch. moedistill itself trains an
        expert on its own segment, and samples a batch at one noise level.

        Args:
            sigmas: `[B]`, one per sample.

        Returns:
            Rows as int64 `[n]`, ascending, on the device of `sigmas`; every row of the batch is there once.

        Raises:
            ValueError: a sigma is outside [0, 1] or NaN, or `sigmas` is not `[B]`.

        Example:
            >>> import torch
            >>> from moedistill import TimestepRouter
            >>> router = TimestepRouter(["semantic", "detail"], [0.9])
            >>> networks = {"semantic": lambda x, sigma: x + 1, "detail": lambda x, sigma: 0 * x}
            >>> x, sigmas = torch.ones(3, 4, 1, 2, 2), torch.tensor([0.95, 0.3, 1.0])
            >>> v = torch.empty_like(x)
            >>> for expert, rows in router.dispatch(sigmas):
            ...     print(expert, rows.tolist())
            ...     v[rows] = networks[expert](x[rows], sigmas[rows])
            semantic [0, 2]
            detail [1]
            >>> v[:, 0, 0, 0, 0].tolist()
            [2.0, 0.0, 2.0]
        """
        rows: dict[str, list[int]] = {expert: [] for expert in self.experts}
        for row, expert in enumerate(self.experts_at(sigmas)):
            rows[expert].append(row)
        device = sigmas.device if isinstance(sigmas, Tensor) else None
        return [
            (expert, torch.tensor(chosen, dtype=torch.int64, device=device))
            for expert, chosen in rows.items()
            if chosen
        ]


def segment_of(expert: str, router: Router | None, trajectory: Trajectory) -> Segment:
    """The noise range in which an expert is trained: its own, or, where no router names it, the whole trajectory."""
    owned = [segment for segment in (router.segments if router else ()) if segment.expert == expert]
    return owned[0] if owned else Segment(expert, trajectory.sigma(0), 1.0)


@dataclass(frozen=True)
class TimestepRouter(Router):
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

    experts: Sequence[str] = field()  # without field() the base's property would be the default
    boundaries: Sequence[float] = ()
    low: float = 0.0
    closed: Closed = "low"
    notes: Sequence[str] = field(default=(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(listed("experts", self.experts)))
        object.__setattr__(
            self, "boundaries", tuple(_number("boundary", b) for b in listed("boundaries", self.boundaries))
        )
        object.__setattr__(self, "low", _number("low", self.low))
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
        if not isinstance(trajectory, Trajectory):
            raise ValueError(f"trajectory must be a Trajectory, not {_article(type(trajectory).__name__)}")
        sigmas = [trajectory.sigma(point) for point in listed("points", points)]
        return cls(experts, sigmas, trajectory.sigma(0), closed)

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
        count = whole("num_train_timesteps", num_train_timesteps)
        times = [_number("timestep", timestep) for timestep in listed("timesteps", timesteps)]
        return cls(experts, [time / count for time in times], low, closed)

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
        return cls(experts, [sigma_of_snr(snr) for snr in listed("snrs", snrs)], low, closed)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One segment per expert, from high to low noise."""
        ends = pairwise([1.0, *self.boundaries, self.low])
        return tuple(
            Segment(expert, low, high, self.closed) for expert, (high, low) in zip(self.experts, ends, strict=True)
        )

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
        if not isinstance(data, Mapping) or set(data) != keys or data["kind"] != "timestep":
            raise ValueError(f"not a timestep router: {data!r}; expected kind 'timestep' and keys {sorted(keys)}")
        return cls(data["experts"], data["boundaries"], data["low"], data["closed"])


def check_router(router: object, trajectory: Trajectory) -> None:
    """ValueError for what moedistill cannot train, export and sample: anything but hard segments, from 1 down in order.

    Each segment meets the one below, owns a point of `trajectory`, and its expert is what `expert_at` gives on it; what
    `to_dict` gives survives JSON and `from_dict`. Of a random choice this sees that it does not keep to the segments.
    """
    if not isinstance(router, Router):
        raise ValueError(f"gives {_article(type(router).__name__)}, which is no Router")
    segments = list(router.segments)
    _check_segments(segments, trajectory)
    if list(router.experts) != [segment.expert for segment in segments]:
        raise ValueError(f"names experts {list(router.experts)}, but its segments are those of {_names(segments)}")
    if type(router).expert_at is not Router.expert_at:
        _check_expert_at(router, segments, trajectory)
    _check_dict(router, segments)


def _check_segments(segments: Sequence[Segment], trajectory: Trajectory) -> None:
    if not segments or not all(isinstance(segment, Segment) for segment in segments):
        raise ValueError(f"gives segments {segments}: there must be one Segment for each expert, and at least one")
    _check_experts(_names(segments), len(segments) - 1)
    top = segments[0]
    if as_sigma(top.high) != 1.0:
        raise ValueError(f"begins at sigma {top.high:.6g} with {top.expert!r}; the first segment must begin at 1")
    for upper, lower in pairwise(segments):
        if as_sigma(upper.low) != as_sigma(lower.high):
            how = "overlap" if upper.low < lower.high else "leave a gap"
            raise ValueError(
                f"gives segments that {how}: {upper.expert!r} ends at sigma {upper.low:.6g}, and {lower.expert!r} "
                f"begins at {lower.high:.6g}; each must begin where the one above ends"
            )
        if upper.closed != lower.closed:
            raise ValueError(
                f"gives segments closed: {upper.closed} for {upper.expert!r} and closed: {lower.closed} for "
                f"{lower.expert!r}; all must be closed alike, so that a boundary belongs to one of them"
            )
    for segment in segments:
        if not trajectory.points_in(segment):
            raise ValueError(
                f"gives {segment.expert!r} sigma {segment.low:.6g} to {segment.high:.6g}, with no point of the "
                "trajectory in it; each segment must hold one"
            )
    if trajectory.sigma(1) not in segments[-1]:
        raise ValueError(
            f"ends at sigma {segments[-1].low:.6g}, without the trajectory point 1 (sigma {trajectory.sigma(1):.6g}); "
            f"the last segment must reach down to point 0 (sigma {trajectory.sigma(0):.6g})"
        )


def _check_expert_at(router: Router, segments: Sequence[Segment], trajectory: Trajectory) -> None:
    """At the points, between them, under the last segment, and beside each boundary."""
    points = trajectory.points.tolist()
    edges = [as_sigma(segment.low) for segment in segments if segment.low > 0]
    beside = [torch.nextafter(torch.tensor(edge), torch.tensor(end)).item() for edge in edges for end in (0.0, 1.0)]
    middles = [(above + below) / 2 for above, below in pairwise(points)]
    for sigma in sorted({0.0, *points, *middles, *edges, *beside}, reverse=True):
        owner, found = Router.expert_at(router, sigma), router.expert_at(sigma)
        if not isinstance(found, str) or found != owner:
            raise ValueError(
                f"gives {found!r} at sigma {sigma:.6g}, which lies in the segment of {owner!r}; expert_at must give "
                "the one expert that its segments name"
            )


def _check_dict(router: Router, segments: Sequence[Segment]) -> None:
    data = router.to_dict()
    try:
        plain = json.loads(json.dumps(data))
        cls = TimestepRouter if plain["kind"] == "timestep" else type(router)
        again = list(cls.from_dict(plain).segments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"cannot be written to an export and read again ({type(error).__name__}: {error}): to_dict must give plain "
            "data with a kind, and from_dict read it"
        ) from error
    if again != segments:
        raise ValueError(f"writes {plain} with to_dict, which from_dict reads as other segments, {again}")


def _names(segments: Sequence[Segment]) -> list[str]:
    return [segment.expert for segment in segments]


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _number(name: str, value: object) -> float:
    """One plain number, with all its digits; ValueError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} {value!r} ({type(value).__name__}) must be a number")
    return float(value)


def sigma_of_snr(snr: float) -> float:
    """Sigma at a signal-to-noise ratio `((1 - sigma) / sigma)²`: `1 / (1 + sqrt(snr))`."""
    if not _number("snr", snr) >= 0:
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
            return trajectory.sigma_of_timestep(_number("timestep", self.timestep))
        if self.snr is not None:
            return sigma_of_snr(self.snr)
        [sigma] = self._given().values()
        return sigma


@dataclass(kw_only=True)
class RouterConfig(Config, ABC):
    """Recipe keys of a router."""

    @abstractmethod
    def build(self, trajectory: Trajectory) -> Router:
        """The router over the segments of `trajectory`: a `TimestepRouter`, or a subclass of `Router`; always the same.

        Its `notes` tell how boundaries were understood.
        """


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


@dataclass(kw_only=True)
class GivenRouterConfig(RouterConfig):
    """A timestep router that is there already, such as an export's: no kind of a recipe's.

    Args:
        data: as `TimestepRouter.to_dict` gives it.
    """

    data: dict[str, Any]

    def build(self, trajectory: Trajectory) -> TimestepRouter:
        return TimestepRouter.from_dict(self.data)


def _check_experts(experts: Sequence[str], num_boundaries: int) -> None:
    if not experts or not all(isinstance(expert, str) and expert for expert in experts):
        raise ValueError(f"experts {list(experts)} must be at least one non-empty name")
    if len(set(experts)) != len(experts):
        raise ValueError(f"experts {list(experts)} must differ: an expert serves one segment")
    if num_boundaries != len(experts) - 1:
        raise ValueError(f"{len(experts)} experts need {len(experts) - 1} boundaries, not {num_boundaries}")
