"""The page's plots, as SVG by matplotlib: how training went, and how at each noise level."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moedistill.plotting import figure, literal, noise_axis, svg
from moedistill.recipe.sampling import boundaries, trajectory_of
from moedistill.runs.callbacks.curves import MOST, chart_of, mark_stages
from moedistill.runs.page.found import FoundRun

OVERLAID = {"loss": "loss", "monitor": "monitor", "gradient norm of the student": "grad_norm/student"}
"""What is compared of several runs, by panel: the names in their metrics."""

SMALL = 60
"""Characters of a legend's entry at most."""


def training_chart(runs: Sequence[FoundRun]) -> str:
    """Of one run all that it logged; of several their losses, monitors and gradient norms, overlaid."""
    label = "Losses, monitor, gradient norms, learning rate and memory by optimiser step"
    if len(runs) == 1:
        return svg(chart_of(runs[0].folder, _stages(runs[0])), label)
    chart, axes = figure("", len(OVERLAID))
    for axis, (title, wanted) in zip(axes, OVERLAID.items(), strict=True):
        for number, run in enumerate(runs):
            lines = [line for (_, name), line in run.metrics.items() if name == wanted]
            for line in lines:
                stride = -(-len(line.steps) // MOST)
                axis.plot(
                    line.steps[::stride], line.values[::stride], color=f"C{number % 10}", linewidth=1.2,
                    label=literal(run.name[:SMALL]) if line is lines[0] else None,
                )  # fmt: skip
        values = [value for line in axis.lines for value in line.get_ydata() if np.isfinite(value)]
        if values and min(values) > 0:
            axis.set_yscale("log")
        axis.set_ylabel(title, fontsize=9)
    longest = max(runs, key=lambda run: sum(stage.steps for stage in run.training))
    mark_stages(axes, _stages(longest))
    chart.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    axes[-1].set_xlabel("optimiser step, counted through the stages")
    return svg(chart, label)


def noise_chart(runs: Sequence[FoundRun]) -> str | None:
    """Errors and gradients by noise level, with the experts' boundaries; None where no run noted any.

    Of one run in the first and in the last third of each stage; of several in the last third alone. The horizontal axis
    is the first run's trajectory, on which those of others are put by their sigmas.
    """
    trajectory = trajectory_of(runs[0].recipe)
    chart, axes = figure("", 2)
    drawn = False
    for number, run in enumerate(runs):
        sigmas = trajectory_of(run.recipe).points.numpy()
        for k, stage in enumerate(run.training):
            colour = f"C{(number if len(runs) > 1 else k) % 10}"
            third = max(1, stage.steps // 3)
            for first, last, style in ((1, third, ":"), (stage.steps - third + 1, stage.steps, "-")):
                levels = run.levels(stage, first, last)
                if not levels.points or (len(runs) > 1 and style == ":"):
                    continue
                drawn = True
                place = np.interp(sigmas[levels.points], trajectory.points.numpy(), np.arange(len(trajectory.points)))
                label = literal(run.name[:SMALL] if len(runs) > 1 else f"{stage.name}, steps {first}–{last}")
                for axis, values in zip(axes, (levels.error, levels.gradient), strict=True):
                    named = axis is axes[0] and (len(runs) == 1 or k == 0)
                    axis.plot(place, values, style, color=colour, marker=".", label=label if named else None)
    if not drawn:
        return None
    for axis, title in zip(axes, ("rms error of a jump", "gradient of a sample"), strict=True):
        axis.set_ylabel(title, fontsize=9)
        if any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
    points = trajectory.points.tolist()[1:]
    noise_axis(axes, points, [point for point in boundaries(runs[0].recipe, trajectory) if 0 < point <= len(points)])
    _name_experts(axes[0], runs[0])
    return svg(chart, "Errors and gradients by noise level, with the boundaries between experts")


def _stages(run: FoundRun) -> list[tuple[str, int]]:
    return [(stage.name, getattr(stage, "steps", 0)) for stage in run.recipe.stages]


def _name_experts(axis: Any, run: FoundRun) -> None:
    """Over each segment, who serves it; the axis goes from noise to data."""
    if run.recipe.router is None:
        return
    trajectory = trajectory_of(run.recipe)
    router = run.recipe.router.build(trajectory)
    starts = [trajectory.points_in(segment) for segment in router.segments]
    for segment, points in zip(router.segments, starts, strict=True):
        if points:
            axis.annotate(
                literal(segment.expert), ((points[0] + points[-1]) / 2, 1.0), (0, 4), ha="center",
                xycoords=("data", "axes fraction"), textcoords="offset points", annotation_clip=False,
            )  # fmt: skip
