"""`moedistill analyze`: DCM's investigation (arXiv 2506.03123, section 3, Fig. 2) of any backbone, and what follows.

It answers four questions with numbers, plots and a recipe: where the teacher decides what (`teacher`), where a single
student's losses and gradients come from and whether they agree (`training`), which layers two experts need for
themselves (`layers`), and hence where to part the experts, where to sample and what to adapt (`suggest`). One process.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from moedistill import plotting
from moedistill.analysis.layers import compare_experts
from moedistill.analysis.results import Analysis, SamplingPoints, TeacherCurves
from moedistill.analysis.suggest import (
    even_points,
    find_decisions,
    landings,
    movable,
    path_error,
    refine_points,
    suggest_boundaries,
    suggest_needs,
    suggest_points,
)
from moedistill.analysis.teacher import TeacherPath, draw_inputs, end_error, follow_teacher, joined
from moedistill.analysis.training import measure_students, train, with_students
from moedistill.analysis.undecided import measure_undecided
from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import UserError, user_errors
from moedistill.flow.trajectory import Trajectory
from moedistill.model import conditioning
from moedistill.model.backbone import Backbone
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.miniature import miniature
from moedistill.recipe.sampling import sampling_sigmas
from moedistill.runs.build import build_run, make_accelerator
from moedistill.runs.encode import with_encoded_videos
from moedistill.runtime.devices import cpu_threads
from moedistill.runtime.lock import claimed
from moedistill.runtime.writing import is_there, refuse_used
from moedistill.stages.consistency import ConsistencyConfig
from moedistill.stages.run import Run

MOST_POINTS = 64
"""A student is measured at so many starting points at most."""
TINY = {"samples": 8, "steps": 3, "points": 10}
"""What is measured of a miniature at most."""


def analyze(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    samples: int = 64,
    steps: int = 50,
    batch_size: int | None = None,
    ranges: int = 8,
    experts: int | None = None,
    student_steps: int | None = None,
    seed: int | None = None,
    smoke: bool = False,
    device: str | None = None,
    output: str | Path | None = None,
    plugins: Plugins | None = None,
) -> Analysis:
    """Analyses a recipe's model and writes analysis.json, plots and suggestion.yaml.

    Args:
        recipe: a recipe, its file or name, or its content.
        overrides: as of `--set`.
        samples: how many paths of the teacher, and how many of the data's samples at each of the student's points.
        steps: optimiser steps for the student and for each of two experts; 0 to train nothing.
        batch_size: of the teacher's paths; the recipe's micro-batch, if not given. A path keeps N velocities.
        ranges: noise ranges whose gradients are compared. Two gradients are kept for each, in main memory.
        experts: how many to suggest boundaries for; the recipe's number, or 2.
        student_steps: sampling steps to suggest points for; the recipe's number, or 4.
        seed: of noise and conditioning, and of training; the recipe's, if not given.
        smoke: a random miniature of the model, few samples and steps.
        device: as torch names it; the accelerator if there is one, else "cpu".
        output: a folder without an analysis; `runs/<name>-analysis/<time>` if not given.
        plugins: as loaded by `load_plugins`; all installed ones if not given.

    Raises:
        UserError: something is wrong with the recipe, the data or a number; or `output` holds another analysis.
    """
    from moedistill.analysis.report import write_report

    plotting.require()
    plugins = plugins or load_plugins()
    source = recipe
    settings = [*overrides, *([] if seed is None else [f"seed={seed}"])]
    if not isinstance(recipe, Recipe) or settings:
        recipe = load_recipe(recipe.resolved() if isinstance(recipe, Recipe) else recipe, settings, plugins)
    given = recipe
    if recipe.data is None:
        raise UserError("analyze needs data, for the teacher's conditioning: add data: {kind: …} to the recipe")
    has_latents, most_points = "latents" in recipe.data.provides, MOST_POINTS
    if has_latents and recipe.backbone.quantized():
        raise UserError(
            "analyze trains full copies of the teacher, and its weights are kept in 8 bits; add --set "
            "backbone.quantization=null"
        )
    if smoke:
        recipe = miniature(recipe)
        samples, steps, most_points = min(samples, TINY["samples"]), min(steps, TINY["steps"]), TINY["points"]
    assert recipe.data is not None
    with user_errors("data"):
        recipe.data.look_ahead()
    recipe = with_encoded_videos(recipe, device, click.echo)
    names = f"{recipe.name}-smoke" if smoke else recipe.name
    folder = Path(output) if output is not None else Path("runs", f"{names}-analysis", time.strftime("%Y%m%d-%H%M%S"))
    if found := [name for name in ("suggestion.yaml", "analysis.json") if is_there(folder / name)]:
        raise UserError(f"{folder} already holds an analysis ({found[0]}); choose another --output, or move it away")
    plan = _Plan(recipe, experts, student_steps)
    with claimed(folder, numbered=output is None) as folder, cpu_threads(recipe.training.num_threads):
        refuse_used(folder)
        work = _Work(recipe, folder, smoke, device)
        analysis = _teacher(work, plan, samples, batch_size or work.micro_batch)
        analysis.smoke, analysis.output = smoke, folder
        if has_latents:
            _training(work, plan, analysis, steps, most_points, ranges)
        write_report(analysis, given, source, settings, plan.trajectory, plugins)
    return analysis


class _Plan:
    """How many experts and steps are asked for, and what the teacher and the recipe's router leave open.

    Attributes:
        fixed: where the teacher's own networks part, as points.
        own: where the recipe's router parts its experts, as points.
        stays: whether it stays, as one whose boundaries the suggestion cannot move.
    """

    def __init__(self, recipe: Recipe, experts: int | None, student_steps: int | None) -> None:
        self.trajectory: Trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
        router = recipe.router.build(self.trajectory) if recipe.router else None
        teachers = recipe.backbone.teacher_router(self.trajectory)
        self.fixed = landings(self.trajectory, teachers) if teachers else []
        self.own = landings(self.trajectory, router) if router else []
        self.experts = experts or max(len(self.own) + 1, 2, len(self.fixed) + 1)
        self.stays = recipe.router is not None and not movable(recipe.router) and self.experts == len(self.own) + 1
        self.own_points = _points_of(recipe, self.trajectory)
        self.student_steps = student_steps or len(self.own_points) or 4
        top = self.trajectory.num_steps
        if not len(self.fixed) < self.experts <= top:
            raise UserError(
                f"experts {self.experts}: this teacher and its {top} steps need {len(self.fixed) + 1} to {top}"
            )
        if self.student_steps > top:
            raise UserError(f"student steps {self.student_steps} are more than the trajectory's {top}")


def _points_of(recipe: Recipe, trajectory: Trajectory) -> list[int]:
    """The recipe's sampling steps as points; none where it has none, or they are not all points."""
    if recipe.sample is None:
        return []
    points = trajectory.points.tolist()
    sigmas = sampling_sigmas(recipe).tolist()[:-1]
    return [points.index(sigma) for sigma in sigmas] if set(sigmas) <= set(points) else []


class _Work:
    """Makes runs on one loaded model, one at a time."""

    def __init__(self, recipe: Recipe, folder: Path, smoke: bool, device: str | None) -> None:
        self.recipe, self.folder, self.smoke = recipe, folder, smoke
        self.accelerator = make_accelerator(recipe, device)
        self.backbone: Backbone | None = None
        training = recipe.training
        self.micro_batch = max(1, training.batch_size // training.gradient_accumulation_steps)

    def run(self, recipe: Recipe) -> Run:
        run = build_run(recipe, self.folder, self.accelerator, smoke=self.smoke, backbone=self.backbone)
        self.backbone = run.mixture.backbone
        return run


def _teacher(work: _Work, plan: _Plan, samples: int, batch_size: int) -> Analysis:
    run = work.run(replace(work.recipe, router=None, experts={}))
    seed = work.recipe.seed
    run.say(f"teacher: {samples} paths of {plan.trajectory.num_steps} steps")
    noise, cond = draw_inputs(run, samples, seed)
    # Points are chosen with one half and judged by the other, which they were not made to suit.
    half = samples // 2
    rows = [slice(0, half), slice(half, None)] if half else [slice(None)]
    inputs = [(noise[part], conditioning.select(cond, part)) for part in rows]
    halves = [follow_teacher(run, *drawn, batch_size) for drawn in inputs]
    path = joined(halves)
    boundaries = suggest_boundaries(path, plan.experts, plan.fixed)
    stops = plan.own if plan.stays else boundaries  # where the suggested recipe's experts part
    errors, fresh, top = halves[0].jump_errors, halves[-1].jump_errors, path.num_steps
    measure, judge = (partial(end_error, run, halves[k], *inputs[k], batch_size) for k in (0, -1))
    lists = {"even": even_points(top, plan.student_steps)}
    if len(plan.own_points) == plan.student_steps:
        lists["own"] = plan.own_points
    starts = [suggest_points(errors, plan.student_steps, stops)]
    if len(stops) < plan.student_steps:
        starts += [points for points in lists.values() if set(stops) <= set(points)]
    chosen, _ = refine_points(min(starts, key=measure), stops, top, measure)
    lists = {"suggested": chosen, **lists}
    sampling = {
        name: SamplingPoints(
            points=points,
            sigma=[plan.trajectory.sigma(point) for point in points],
            model_error=path_error(fresh, points),
            end_error=judge(points),
        )
        for name, points in lists.items()
    }
    undecided = None
    if samples > 1:
        run.say(f"what is undecided where: {samples} samples, noised anew")
        undecided = measure_undecided(run, path.ends, cond, batch_size, [*boundaries, *plan.own])
    numbers = range(1, min(8, top) + 1)
    return Analysis(
        recipe=work.recipe.name,
        smoke=False,
        samples=samples,
        seed=seed,
        teacher=_curves(path),
        decisions=find_decisions(path),
        boundaries=boundaries,
        boundary_sigmas=[plan.trajectory.sigma(point) for point in boundaries],
        sampling=sampling,
        error_by_steps={
            n: (path_error(fresh, suggest_points(errors, n, [])), path_error(fresh, even_points(top, n)))
            for n in numbers
        },
        own_boundaries=plan.own,
        undecided=undecided,
    )


def _curves(path: TeacherPath) -> TeacherCurves:
    def numbers(curve: Tensor) -> list[float]:
        values: list[float] = curve.tolist()
        return values

    return TeacherCurves(
        sigma=numbers(path.levels[1:]),
        relative_change=numbers(path.relative_change),
        clean_change=numbers(path.clean_change),
        decision_rate=numbers(path.decision_rate),
        remaining=numbers(path.remaining),
        curvature=numbers(path.curvature),
    )


def _training(work: _Work, plan: _Plan, analysis: Analysis, steps: int, most_points: int, ranges: int) -> None:
    """Adds to `analysis` what needs a student."""
    run = work.run(with_students(work.recipe, steps))
    run.say(f"one student: losses and gradients of {analysis.samples} samples at each point")
    measure = partial(measure_students, samples=analysis.samples, most_points=most_points, num_ranges=ranges)
    analysis.student = [measure(run, steps=0, boundaries=analysis.boundaries)]
    if not steps:
        return
    _train_all(run, steps)
    analysis.student.append(measure(run, steps=steps, boundaries=analysis.boundaries))
    if not plan.fixed:  # a teacher of several networks has one student for each already
        del run  # there is not room for its student beside two
        run = work.run(with_students(work.recipe, steps, point=(plan.own or analysis.boundaries)[0]))
        _train_all(run, steps)
    upper, lower = (stage.expert for stage in run.recipe.stages[:2])  # type: ignore[attr-defined]
    analysis.layers = compare_experts(run.mixture, upper, lower, steps)
    analysis.needs = suggest_needs(analysis.layers)


def _train_all(run: Run, steps: int) -> None:
    for stage in run.recipe.stages:
        assert isinstance(stage, ConsistencyConfig)
        run.say(f"training {stage.expert}: {steps} steps")
        train(run, stage)
