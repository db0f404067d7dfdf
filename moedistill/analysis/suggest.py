"""From measured curves to a recipe: where to part the experts, where to sample, and what an expert needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from moedistill.analysis.layers import LayerDifferences
from moedistill.analysis.teacher import TeacherPath
from moedistill.flow.routers import Router, RouterConfig, TimestepRouterConfig
from moedistill.flow.trajectory import Trajectory

VALLEY = 0.6
"""Two humps of the curve are two decisions if the valley between is below this share of the lower one."""
LEAST = 0.04
"""A decision carries at least this share of all change of the clean estimate."""


@dataclass
class Decision:
    """A range of noise levels in which the clean estimate makes up its mind about one scale of the data.

    Attributes:
        low, high: its points; steps that start at low + 1 … high belong to it.
        point: where half of its change is done, coming from above.
        share: of the whole change of the clean estimate.
    """

    low: int
    high: int
    point: int
    share: float


def find_decisions(path: TeacherPath) -> list[Decision]:
    """The decisions along a path, the one that changes most first.

    The curve of `decision_rate` over `remaining`, in which small scales count as much as large ones, is cut at its
    valleys. Within a decision the noise level that counts is the median of the clean estimate's way: half of it has
    been travelled there. For well separated components at ±m with variance τ² that is where the ODE's symmetry breaks,
    (1-σ)²·|m|² = (1-σ)²·τ² + σ²: above, the middle between the components is stable and the estimate stays near it;
    below, paths leave for one component or the other. Where detail varies as much as layout it comes out lower.
    """
    way, left = path.clean_change[1:], path.remaining[1:]
    rate = (path.decision_rate[1:] / left.clamp(min=torch.finfo(left.dtype).tiny)).tolist()
    whole = way.sum().item()
    if whole == 0:
        return []
    found = []
    for first, last in _humps(rate, 0, len(rate)):
        part = way[first:last]
        half = int(torch.searchsorted(part.cumsum(0), part.sum() / 2))
        found.append(Decision(first + 1, last + 1, min(first + half + 1, last), part.sum().item() / whole))
    return sorted((decision for decision in found if decision.share >= LEAST), key=lambda decision: -decision.share)


def _humps(rate: list[float], first: int, last: int) -> list[tuple[int, int]]:
    """Ranges `[first, last)` of a curve between its deep valleys."""
    depths = {
        k: rate[k] / least
        for k in range(first + 1, last - 1)
        if (least := min(max(rate[first:k]), max(rate[k + 1 : last]))) > 0
    }
    deepest = min(depths, key=lambda k: depths[k], default=None)
    if deepest is None or depths[deepest] > VALLEY:
        return [(first, last)]
    return _humps(rate, first, deepest) + _humps(rate, deepest, last)


def landings(trajectory: Trajectory, router: Router) -> list[int]:
    """The points, descending, where the students of all segments but the last land: boundaries, whoever owns them."""
    return [trajectory.points_in(segment)[0] - 1 for segment in router.segments[:-1]]


def movable(router: RouterConfig) -> bool:
    """Whether a recipe's router has boundaries that a suggestion can move; of another kind it places them itself."""
    return type(router) is TimestepRouterConfig


def suggest_boundaries(path: TeacherPath, num_experts: int, fixed: list[int]) -> list[int]:
    """Points that part `num_experts` experts, descending; each is where the students above it land.

    First those that are `fixed`, such as the teacher's own; then the decisions', the largest first; and while there are
    too few, the segment in which the clean estimate travels farthest is cut where it is half-way. No segment is left
    with fewer than two points, where there are enough.

    This looks at the teacher's path alone: it says where the kind of work changes, half-way through a decision. Whether
    one network finds the two kinds hard to reconcile is another question, which no student is asked here;
    `StudentCurves.across` answers it for the boundaries suggested, and a cosine near 1 there is a reason for doubt.
    """
    chosen = list(fixed)
    for decision in find_decisions(path):
        if len(chosen) < num_experts - 1 and all(abs(decision.point - point) > 1 for point in chosen):
            chosen.append(decision.point)
    way = path.clean_change
    while len(chosen) < num_experts - 1:
        edges = sorted({0, *chosen, path.num_steps})
        low, high = max(pairwise(edges), key=lambda pair: (way[pair[0] : pair[1]].sum().item(), pair[1] - pair[0]))
        half = int(torch.searchsorted(way[low:high].cumsum(0), way[low:high].sum() / 2))
        chosen.append(min(max(low + half, low + 1), high - 1))
    return _apart(sorted(chosen), path.num_steps)[::-1]


def _apart(points: list[int], top: int) -> list[int]:
    """Ascending points moved as little as needed to leave room between each other, 0 and `top`."""
    least = 2 if top >= 2 * (len(points) + 1) else 1
    moved: list[int] = []
    for k, point in enumerate(points):
        lowest = (moved[-1] if moved else 0) + least
        moved.append(min(max(point, lowest), top - (len(points) - k) * least))
    return moved


def suggest_points(errors: Tensor, num_steps: int, stops: list[int]) -> list[int]:
    """The `num_steps` points, descending, whose jumps miss the teacher's path by least; the last jump goes to 0.

    Model of the error: every jump starts on the teacher's path (a student learns its jumps there); what it misses is
    carried to the end at its size; and the errors of different jumps point in unrelated directions, so that their
    squares add. It neglects that the ODE amplifies an error made where a decision is open, and damps others.

    Args:
        errors: rms error of one jump from point i to point j, `[N + 1, N + 1]`, infinite unless j < i.
        stops: points that no jump may cross: the experts' boundaries. Ignored if there are too few steps to stop there.
    """
    top = len(errors) - 1
    cost = errors.square()
    if len(stops) < num_steps:
        for stop in stops:
            cost[stop + 1 :, :stop] = torch.inf
    best = torch.full((num_steps + 1, top + 1), torch.inf, dtype=cost.dtype)
    best[0, top] = 0.0
    came_from = torch.zeros(num_steps + 1, top + 1, dtype=torch.long)
    for step in range(1, num_steps + 1):
        best[step], came_from[step] = (best[step - 1][:, None] + cost).min(dim=0)
    points, point = [], 0
    for step in range(num_steps, 0, -1):
        point = int(came_from[step, point])
        points.append(point)
    return points[::-1]


def refine_points(
    points: list[int], stops: list[int], top: int, measure: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """Points moved while that lowers their measured error, and the error: what the model of `suggest_points` neglects.

    One point at a time goes up or down, by an eighth of the trajectory at first, then by half as much, at last by one:
    each until no move lowers the error. The first point and the `stops` stay; if the list does not hold all of these,
    no point is kept but the first. The error is that of the samples that `measure` has, which the points now suit.
    """
    measure = _once(measure)
    best, error = list(points), measure(points)
    kept = {top, *(stops if set(stops) <= set(points) else [])}
    stride = max(1, top // 8)
    while stride:
        lower = next(
            ((moved, found) for moved in _moves(best, kept, top, stride) if (found := measure(moved)) < error), None
        )
        if lower is None:
            stride //= 2
        else:
            best, error = lower
    return best, error


def _moves(points: list[int], kept: set[int], top: int, stride: int) -> Iterator[list[int]]:
    """All lists with one point moved by `stride` to a free place."""
    for point in points:
        for moved in (point + stride, point - stride):
            if point not in kept and 0 < moved < top and moved not in points:
                yield sorted([moved, *(other for other in points if other != point)], reverse=True)


def _once(measure: Callable[[list[int]], float]) -> Callable[[list[int]], float]:
    """`measure`, which samples, without doing it again for a list."""
    known = cache(lambda points: measure(list(points)))
    return lambda points: known(tuple(points))


def path_error(errors: Tensor, points: list[int]) -> float:
    """The error of sampling at `points` by the model of `suggest_points`."""
    return sum(errors[i, j].item() ** 2 for i, j in pairwise([*points, 0])) ** 0.5


def even_points(top: int, num_steps: int) -> list[int]:
    """Evenly spaced points, as `sample: {steps: n}` takes them for a teacher."""
    return [top - k * top // num_steps for k in range(num_steps)]


@dataclass
class ExpertNeeds:
    """What an adapter should change: groups of `lora_targets`, and `copies` as a recipe takes them."""

    targets: list[str]
    copies: str | list[str]


def suggest_needs(layers: LayerDifferences) -> ExpertNeeds:
    """Where the experts' changes disagree at least as much as in the whole network, of what the backbone offers.

    Of the groups of linears the one with the most disagreement is always taken: an adapter needs a target. What moved
    far, but the same way in both experts, is not among them: an expert that starts from the other has it already.
    """
    least = layers.whole or 0.0
    groups = {name: disagreement or 0.0 for name, disagreement in layers.groups.items()}
    targets = [name for name, disagreement in groups.items() if disagreement >= least]
    copies = [path for path, disagreement in layers.modules.items() if (disagreement or 0.0) >= least]
    return ExpertNeeds(
        targets=targets or [max(groups, key=lambda name: groups[name])],
        copies="time_dependent" if len(copies) == len(layers.modules) else copies or "none",
    )
