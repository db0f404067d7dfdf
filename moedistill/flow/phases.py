"""Phases of a segment: where its jumps land."""

from collections.abc import Collection
from itertools import pairwise

import torch
from torch import Tensor

from moedistill.flow.trajectory import Segment, Trajectory


def stops_in(segment: Segment, sigmas: list[float], trajectory: Trajectory) -> list[int]:
    """The inner points of a segment at which sampling stops, ascending; ValueError where a stop is no point."""
    points = trajectory.points_in(segment)
    stops = [sigma for sigma in sigmas if sigma in segment]
    found = {sigma: point for point in points if (sigma := trajectory.sigma(point)) in stops}
    if between := [sigma for sigma in stops if sigma not in found]:
        raise ValueError(f"sampling: sample's sigma {between[0]:.6g} is no point of the trajectory; give sample points")
    return sorted(point for point in found.values() if point != points[-1])


def phase_edges(starts: range, phases: int | list[int]) -> list[int]:
    """Lower edges of a segment's phases, as points, ascending; `starts` are the points where its jumps start.

    `phases` M cuts at starts[0] - 1 + floor(k·n/M), k = 0..M, n = len(starts); a list gives the inner edges themselves.

    Raises:
        ValueError: more phases than starting points, or an edge outside the segment.
    """
    lowest, n = starts[0] - 1, len(starts)
    if isinstance(phases, int):
        if phases > n:
            raise ValueError(f"phases: {phases} for a segment of {n} points; at most {n} are possible")
        return [lowest + k * n // phases for k in range(phases)]
    else:
        outside = [point for point in phases if point not in range(lowest + 1, starts[-1])]
        if outside:
            raise ValueError(
                f"phases.points: {outside[0]} is not inside the segment, whose inner points are "
                f"{lowest + 1} to {starts[-1] - 1}"
            )
        return sorted({lowest, *phases})


def spread(edges: Collection[int], top: int, steps: int, boundaries: Collection[int] = ()) -> list[int]:
    """Points at which `steps` steps from `top` to the end start, descending, over the phases with these lower edges.

    All phases have as many steps, as far as their points allow; what is left over goes to those that span the most
    points, the noisiest first. Within its phase from p to q step k of s starts at p - floor(k·(p - q)/s). With fewer
    steps than phases, those of each expert, from one of `boundaries` to the next, share them alike: n of its m phases
    start steps, every (m/n)-th. With fewer steps than experts the same goes for experts.

    Raises:
        ValueError: more steps than points.
    """
    if steps > top:
        raise ValueError(f"steps {steps} is more than the trajectory's {top}")
    starts = sorted({top, *edges, *boundaries} - {0}, reverse=True)
    if steps < len(starts):
        firsts = sorted({top, *boundaries} - {0}, reverse=True)
        if steps < len(firsts):
            return _every(firsts, steps)
        experts = [[s for s in starts if above >= s > below] for above, below in pairwise([*firsts, 0])]
        shares = _shared(steps, [len(own) for own in experts])
        return [start for own, share in zip(experts, shares, strict=True) for start in _every(own, share)]
    spans = [start - end for start, end in pairwise([*starts, 0])]
    parts = _shared(steps, spans)
    return [
        start - k * span // part for start, span, part in zip(starts, spans, parts, strict=True) for k in range(part)
    ]


def _every(starts: list[int], steps: int) -> list[int]:
    """So many of them, evenly."""
    return [starts[k * len(starts) // steps] for k in range(steps)]


def _shared(steps: int, most: list[int]) -> list[int]:
    """As many for each, as far as its most allows; what is left over for those that allow the most, the first first."""
    parts = [0] * len(most)
    largest_first = sorted(range(len(most)), key=lambda one: -most[one])
    while (left := steps - sum(parts)) > 0:
        for one in [one for one in largest_first if parts[one] < most[one]][:left]:
            parts[one] += 1
    return parts


def landing_points(starts: range, phases: int | list[int]) -> Tensor:
    """Where the jump from each starting point lands, as a point, int64 `[len(starts)]`; `phases` as in `phase_edges`.

    A starting point equal to an edge belongs to the phase below it.
    """
    edges = phase_edges(starts, phases)
    return torch.tensor([max(edge for edge in edges if edge < start) for start in starts])
