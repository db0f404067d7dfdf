"""What the analysis trains: one student for all noise levels, or two, and where losses and gradients come from."""

import math
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moedistill.data.loading import Batch, load_batches
from moedistill.errors import UserError, user_errors
from moedistill.flow.routers import Boundary, TimestepRouterConfig
from moedistill.losses.base import HuberConfig, StepTensors
from moedistill.model.experts import ExpertConfig, FullConfig
from moedistill.recipe.keys import Recipe, StageConfig
from moedistill.stages.consistency import ConsistencyConfig, ConsistencyStage
from moedistill.stages.run import Run
from moedistill.stages.training import STUDENT, NotFinite, Training


def consistency_template(recipe: Recipe) -> ConsistencyConfig:
    """The recipe's first consistency stage with one phase, no probe, and the losses that need none, from step 0."""
    found = [stage for stage in recipe.stages if isinstance(stage, ConsistencyConfig)]
    template = found[0] if found else ConsistencyConfig(name="analyze", expert="student", steps=1, losses=[])
    losses = [loss.replace(start=0, warmup=0) for loss in template.losses if not loss.needs_probe and loss.weight > 0]
    return template.replace(losses=losses or [HuberConfig()], probe=None, phases=1)


def with_students(recipe: Recipe, steps: int, point: int | None = None) -> Recipe:
    """The recipe with full experts in place of its own, each equal to the teacher and with one stage of `steps`.

    One expert for each of the teacher's networks, on its own range. With `point` (a teacher of one network) there are
    two, of which the lower one starts at that point.
    """
    trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
    teachers = recipe.backbone.teacher_router(trajectory)
    bases: Sequence[str | None] = [None]
    router = TimestepRouterConfig(experts=["student"])
    if teachers is not None:
        bases = teachers.experts
        boundaries = [Boundary(sigma=segment.low) for segment in teachers.segments[:-1]]
        router = TimestepRouterConfig(experts=list(bases), boundaries=boundaries, closed=teachers.segments[0].closed)
    elif point is not None:
        bases = [None, None]
        router = TimestepRouterConfig(experts=["upper", "lower"], boundaries=[Boundary(point=point)])
    template = consistency_template(recipe)
    stages: list[StageConfig] = [
        template.replace(name=name, expert=name, steps=max(1, steps)) for name in router.experts
    ]
    experts: dict[str, ExpertConfig] = {
        name: FullConfig(base=base) for name, base in zip(router.experts, bases, strict=True)
    }
    return replace(recipe, router=router, experts=experts, stages=stages)


def train(run: Run, config: ConsistencyConfig) -> None:
    """One stage, as a run does it but without checkpoints and observers."""
    training, stage = set_up(run, config)
    with closing(_batches(run, config.name, config.steps)) as batches, training.mixture.using(config.expert):
        for batch in batches:
            with training.micro_batch(), user_errors("analyze: training"):
                stage.step(training, training.begin(batch))
            if batch.boundary:
                training.end_step()
                try:
                    training.take_metrics()
                except NotFinite as error:
                    raise UserError(f"analyze: {error}; lower the learning rate, or check the data") from error
    training.release()


def set_up(run: Run, config: ConsistencyConfig) -> tuple[Training, ConsistencyStage]:
    """A stage ready for its first step."""
    training, stage = Training(run, config), config.build()
    with user_errors("analyze"):
        stage.setup(training)
    return training, stage


@dataclass
class StudentCurves:
    """Consistency loss and gradient of one student for all noise levels, by where its jump starts.

    "Per jump" means: prediction and target are divided by the length of the jump, p_i - end, before the loss is taken,
    so that a short jump's small loss is not mistaken for an easy task.

    Attributes:
        steps: optimiser steps that the student was trained for before.
        points: trajectory points where the jumps start, ascending.
        sigma, jump: their sigmas, and the lengths of the jumps.
        loss, loss_per_jump: means over the samples.
        gradient, gradient_per_jump: L2 norms of the gradients of these means.
        ranges: lowest and highest point of each noise range.
        cosine, cosine_per_jump: between the mean gradients of two ranges; None where they have no weight in common.
        boundaries: points, as given.
        across, across_per_jump: at each of them, the cosine between the mean gradients of all points above it and of
            all below, up to the next boundaries: how well one network can serve both sides. None as for `cosine`.
    """

    steps: int
    points: list[int]
    sigma: list[float]
    jump: list[float]
    loss: list[float]
    loss_per_jump: list[float]
    gradient: list[float]
    gradient_per_jump: list[float]
    ranges: list[tuple[int, int]]
    cosine: list[list[float | None]]
    cosine_per_jump: list[list[float | None]]
    boundaries: list[int]
    across: list[float | None]
    across_per_jump: list[float | None]


@dataclass
class _Point:
    """What was measured at one starting point; pairs are plain, and per jump."""

    jump: float
    losses: tuple[float, float]
    norms: tuple[float, float]


def measure_students(
    run: Run, samples: int, most_points: int, num_ranges: int, steps: int, boundaries: Sequence[int] = ()
) -> StudentCurves:
    """`StudentCurves` of the experts in `run`, on `samples` of the data with the same noise at every point.

    Gradients are made for one point at a time; two are kept for each range, on the CPU. Weights and averages stay as
    they are: with `target: ema` the target is that of training.

    Args:
        most_points: measure at so many points at most, spread over each expert's segment.
        num_ranges: how many noise ranges, over all experts; at least one for each, and no fewer than `boundaries` make.
        steps: what the experts were trained for.
        boundaries: points that no range crosses; those above belong to the higher range.
    """
    stages = [stage for stage in run.recipe.stages if isinstance(stage, ConsistencyConfig)]
    total = run.mixture.trajectory.num_steps
    measured: dict[int, _Point] = {}
    ranges: list[tuple[int, int]] = []
    gradients: list[tuple[str, list[Tensor]]] = []
    for config in reversed(stages):  # from low to high noise
        trained = run.mixture.ema.get(config.expert)
        training, stage = set_up(run, config)
        average = training.trained[STUDENT].average
        if average is not None and trained is not None:
            average.load(trained.average)  # a new stage's average starts as the weights
        starts = training.trajectory.points_in(training.segment)
        count = min(len(starts), max(1, round(most_points * len(starts) / total)))
        points = [starts[0] + (len(starts) - 1) * k // max(1, count - 1) for k in range(count)]
        parts = min(count, max(1, round(num_ranges * len(starts) / total)))
        batches = list(_noisy_batches(run, training, samples))
        with training.mixture.using(config.expert):
            for low, high in pairwise(_cuts(points, parts, boundaries)):
                sums: list[Tensor] = []
                for point in points[low:high]:
                    measured[point], found = _measure(training, stage, batches, point)
                    sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
                ranges.append((points[low], points[high - 1]))
                gradients.append((config.expert, sums))
        training.release()
    plain, per_jump = (_products([(expert, sums[k]) for expert, sums in gradients]) for k in (0, 1))
    points = sorted(measured)
    rows = [measured[point] for point in points]
    return StudentCurves(
        steps=steps,
        points=points,
        sigma=[run.mixture.trajectory.sigma(point) for point in points],
        jump=[row.jump for row in rows],
        loss=[row.losses[0] for row in rows],
        loss_per_jump=[row.losses[1] for row in rows],
        gradient=[row.norms[0] for row in rows],
        gradient_per_jump=[row.norms[1] for row in rows],
        ranges=ranges,
        cosine=_cosines(plain),
        cosine_per_jump=_cosines(per_jump),
        boundaries=list(boundaries),
        across=_across(plain, ranges, boundaries),
        across_per_jump=_across(per_jump, ranges, boundaries),
    )


def _cuts(points: Sequence[int], parts: int, boundaries: Sequence[int]) -> list[int]:
    """Where ascending `points` are cut into ranges: evenly, but the nearest cuts give way to the boundaries."""
    even = {k * len(points) // parts for k in range(1, parts)}
    fixed = {bisect_right(points, boundary) for boundary in boundaries} - {0, len(points)}
    for cut in fixed:
        even -= {min(even, key=lambda other: abs(other - cut), default=cut)}
    return sorted({0, len(points), *even, *fixed})


def _batches(run: Run, name: str, steps: int, batch_size: int | None = None) -> Generator[Batch, None, None]:
    settings = run.recipe.training
    assert run.dataset is not None
    return load_batches(
        run.dataset,
        batch_size=batch_size or settings.batch_size,
        accumulation=1 if batch_size else settings.gradient_accumulation_steps,
        seed=run.recipe.seed,
        stage=name,
        steps=range(steps),
        num_workers=settings.num_workers if batch_size is None else 0,
    )


def _noisy_batches(run: Run, training: Training, samples: int) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the data, prepared as the stage has them, each with its noise."""
    size = min(samples, max(1, run.recipe.training.batch_size // run.recipe.training.gradient_accumulation_steps))
    for number, batch in enumerate(_batches(run, "analyze", -(-samples // size), size)):
        training.step = number  # the address of the draws
        batch = training.begin(batch)
        yield batch, training.draw.normal("noise", batch.latents.shape[1:])
    training.step = 0


def _measure(
    training: Training, stage: ConsistencyStage, batches: Sequence[tuple[Batch, Tensor]], point: int
) -> tuple[_Point, list[Tensor]]:
    """The stage's own loss for jumps that all start at `point`; and its gradients, flat, plain and per jump."""
    parameters = list(training.trained[STUDENT].parameters.values())
    losses, gradients, length = [0.0, 0.0], [torch.zeros(()), torch.zeros(())], 0.0
    for batch, noise in batches:
        x0 = batch.latents
        made = stage.jumps(training, x0, batch.conditioning, torch.full((len(x0),), point), noise)
        length = (made.sigma - made.end)[0].item()
        for k, unit in enumerate((1.0, length)):
            tensors = StepTensors(
                made.prediction / unit, made.target / unit, made.difference / unit, made.sigma, training.segment
            )
            loss = training.objective(tensors) / len(batches)
            found = torch.autograd.grad(loss, parameters, retain_graph=k == 0, materialize_grads=True)
            gradients[k] = gradients[k] + torch.cat([part.detach().float().flatten() for part in found]).cpu()
            losses[k] += loss.item()
    training.forget_metrics()
    norms = (gradients[0].norm().item(), gradients[1].norm().item())
    return _Point(length, (losses[0], losses[1]), norms), gradients


def _products(gradients: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Inner products of experts' gradients, `[R, R]` float64; nan between those of different experts."""
    found = torch.full((len(gradients), len(gradients)), torch.nan, dtype=torch.float64)
    for row, (expert, a) in enumerate(gradients):
        for column, (other, b) in enumerate(gradients[: row + 1]):
            if expert == other:
                found[row, column] = found[column, row] = a.double() @ b.double()
    return found


def _cosine(products: Tensor, above: Sequence[int], below: Sequence[int]) -> float | None:
    """Between the sums of two sets of gradients, from the products of all."""

    def inner(rows: Sequence[int], columns: Sequence[int]) -> float:
        return products[rows][:, columns].sum().item()

    # Of gradients that cancel out, rounding may leave a square below 0.
    squares = max(inner(above, above), 0.0) * max(inner(below, below), 0.0)
    found = inner(above, below) / squares**0.5 if squares > 0 else math.nan
    return None if math.isnan(found) else found


def _cosines(products: Tensor) -> list[list[float | None]]:
    return [[_cosine(products, [row], [column]) for column in range(len(products))] for row in range(len(products))]


def _across(products: Tensor, ranges: Sequence[tuple[int, int]], boundaries: Sequence[int]) -> list[float | None]:
    """The cosine at each boundary between the ranges above it and those below it."""
    found: list[float | None] = []
    for boundary in boundaries:
        upper = min((other for other in boundaries if other > boundary), default=math.inf)
        lower = max((other for other in boundaries if other < boundary), default=0)
        above = [k for k, (low, high) in enumerate(ranges) if boundary < low and high <= upper]
        below = [k for k, (low, high) in enumerate(ranges) if lower < low and high <= boundary]
        found.append(_cosine(products, above, below) if above and below else None)
    return found
