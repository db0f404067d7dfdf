"""Writes an analysis: numbers, plots, the suggested recipe, and a table on the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moedistill.analysis.recipe import write_recipe
from moedistill.flow.trajectory import Trajectory
from moedistill.plotting import figure, noise_axis, save
from moedistill.recipe.keys import Recipe
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.writing import new_file

if TYPE_CHECKING:
    from moedistill.analysis.results import Analysis
    from moedistill.components.plugins import Plugins

SHOWN_LAYERS = 20
COLOURS = {"lora": "#d1495b", "time": "#edae49", "other": "#8d99ae"}


def write_report(
    analysis: "Analysis",
    recipe: Recipe,
    source: object,
    overrides: Sequence[str],
    trajectory: Trajectory,
    plugins: "Plugins",
) -> None:
    """Everything into `analysis.output`."""
    folder = analysis.output
    numbers = {**asdict(analysis), "output": None}
    write_text(folder / "analysis.json", json.dumps(numbers, indent=1))
    files = ["analysis.json", *draw(analysis)]
    write_recipe(folder / "suggestion.yaml", analysis, recipe, source, overrides, trajectory, plugins)
    show(analysis)
    for name in [*files, "suggestion.yaml"]:
        click.echo(f"  {folder / name}")


def draw(analysis: "Analysis") -> list[str]:
    """One figure for each question; the names of the files."""
    plots = {"teacher.png": _draw_teacher, "sampling.png": _draw_sampling}
    if analysis.undecided is not None:
        plots["undecided.png"] = _draw_undecided
    if analysis.student:
        plots |= {"student.png": _draw_student, "conflicts.png": _draw_conflicts}
    if analysis.layers is not None:
        plots["layers.png"] = _draw_layers
    for name, plot in plots.items():
        with new_file(analysis.output / name) as new:
            save(plot(analysis), new)
    return list(plots)


def _draw_teacher(analysis: "Analysis") -> Any:
    """What the teacher does along its path."""
    teacher = analysis.teacher
    curves = {
        "sample changes\n|Δx| / |x|": teacher.relative_change,
        "clean estimate changes\n|d x0 / d log(σ/(1-σ))|": teacher.decision_rate,
        "clean estimate\nstill to go, rms": teacher.remaining,
        "curvature\n|dv / dσ|": teacher.curvature,
    }
    chart, axes = figure(_title(analysis, "Where the teacher decides what"), len(curves))
    for axis, (label, values) in zip(axes, curves.items(), strict=True):
        first = 1 if values[0] == 0 else 0  # unknown for the last step
        axis.plot(range(first + 1, len(values) + 1), values[first:], marker=".", color="#00798c")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    noise_axis(axes, teacher.sigma, analysis.boundaries)
    return chart


def _draw_undecided(analysis: "Analysis") -> Any:
    """Which share of the variance is undecided, by band of spatial frequency: what is left for whom to decide."""
    undecided, sigma = analysis.undecided, analysis.teacher.sigma
    assert undecided is not None
    chart, [axis] = figure(_title(analysis, "What is undecided where, by wavelength in latent cells"), 1, height=4.2)
    for number, (name, power) in enumerate(zip(undecided.bands, undecided.power, strict=True)):
        label = f"{name} ({power:.0%} of the variance)"
        axis.plot(undecided.points, undecided.teacher[number], marker=".", color=f"C{number}", label=label)
        if undecided.exact is not None:
            axis.plot(undecided.points, undecided.exact[number], color=f"C{number}", linestyle=":")
    if undecided.exact is not None:
        axis.plot([], [], color="black", linestyle=":", label="exact, of the data")
    axis.set_ylabel("share of the variance\nthat is undecided")
    axis.set_ylim(0, 1.05 * max(1.0, *(max(shares) for shares in undecided.teacher)))
    noise_axis([axis], sigma, analysis.own_boundaries or analysis.boundaries)
    return chart


def _draw_student(analysis: "Analysis") -> Any:
    """Loss and gradient of a single student, plain and per jump."""
    chart, axes = figure(_title(analysis, "One student for all noise levels"), 2, columns=2)
    for column, (suffix, title) in enumerate((("", "plain"), ("_per_jump", "per length of the jump"))):
        for axis, name in zip(axes[:, column], ("loss", "gradient"), strict=True):
            for curves in analysis.student:
                values = getattr(curves, name + suffix)
                axis.plot(curves.points, values, marker=".", label=f"after {curves.steps} steps")
            largest = max(max(getattr(curves, name + suffix)) for curves in analysis.student)
            if largest > 0:  # a student equal to the teacher has no loss at the lowest point
                axis.set_yscale("log", nonpositive="mask")
                axis.set_ylim(largest / 1e5, 2 * largest)
            axis.set_ylabel({"loss": "consistency loss", "gradient": "norm of its gradient"}[name])
        axes[0, column].set_title(title)
        noise_axis(axes[:, column], analysis.teacher.sigma, analysis.boundaries, labels=6)
    return chart


def _draw_conflicts(analysis: "Analysis") -> Any:
    """Whether noise ranges pull the same way."""
    curves = analysis.student[-1]
    title = f"Do the noise ranges agree? Cosines of a student's gradients after {curves.steps} steps"
    chart, axes = figure(_title(analysis, title), 1, columns=2, height=5.2, share=False)
    sigma = analysis.teacher.sigma
    ends = [list(dict.fromkeys((f"{sigma[high - 1]:.3f}", f"{sigma[low - 1]:.3f}"))) for low, high in curves.ranges]
    labels = ["–".join(end) for end in reversed(ends)]
    for axis, matrix, name in zip(
        axes[0], (curves.cosine, curves.cosine_per_jump), ("plain", "per length of the jump"), strict=True
    ):
        rows = [[float("nan") if value is None else value for value in row[::-1]] for row in matrix[::-1]]
        axis.grid(visible=False)
        image = axis.imshow(rows, vmin=-1, vmax=1, cmap="RdBu")
        axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right")
        axis.set_yticks(range(len(labels)), labels)
        axis.set(title=name, xlabel="σ of the jumps' starts", ylabel="σ of the jumps' starts")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                text = "–" if value != value else f"{value:.2f}"
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black"
                )
    chart.colorbar(image, ax=axes[0], shrink=0.8, label="cosine")
    return chart


def _draw_layers(analysis: "Analysis") -> Any:
    """Which kinds of layers two experts need for themselves."""
    layers = analysis.layers
    assert layers is not None
    kinds = [kind for kind in layers.kinds if kind.disagreement is not None][:SHOWN_LAYERS][::-1]
    title = f"Where two experts disagree after {layers.steps} steps each"
    chart, axes = figure(_title(analysis, title), 1, height=1.9 + 0.27 * len(kinds), share=False)
    [axis] = axes
    colours = [COLOURS["lora" if kind.groups else "time" if kind.time_dependent else "other"] for kind in kinds]
    axis.barh([kind.name for kind in kinds], [kind.disagreement or 0 for kind in kinds], color=colours)
    axis.axvline(layers.whole or 0, color="black", linestyle=":")
    axis.set_xlabel(
        "|A - B| / (|A| + |B|) of the experts' changes: 0, the same; 1, the opposite\n(dotted: the whole network)"
    )
    names = {"lora": "can be adapted (lora_targets)", "time": "time-dependent", "other": "other"}
    axis.legend([_patch(colour) for colour in COLOURS.values()], [names[key] for key in COLOURS], loc="lower right")
    return chart


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _draw_sampling(analysis: "Analysis") -> Any:
    """Where to sample, and what it is worth."""
    chart, axes = figure(_title(analysis, "Where to sample"), 2, height=6.0, share=False)
    steps = list(analysis.error_by_steps)
    for number, name in enumerate(("best points (no boundary kept)", "even points")):
        axes[0].plot(steps, [errors[number] for errors in analysis.error_by_steps.values()], marker="o", label=name)
    axes[0].set(xlabel="sampling steps", ylabel="error, if it neither\ngrew nor faded, rms", xticks=steps)
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    for row, chosen in enumerate(analysis.sampling.values()):
        axes[1].plot(chosen.points, [row] * len(chosen.points), "o", markersize=9)
        for point, sigma in zip(chosen.points, chosen.sigma, strict=True):
            axes[1].annotate(f"{sigma:.3f}", (point, row), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    labels = [f"{name}\nerror {chosen.end_error:.3g}" for name, chosen in analysis.sampling.items()]
    axes[1].set_yticks(range(len(labels)), labels)
    axes[1].set_ylim(len(labels) - 0.5, -0.7)
    noise_axis([axes[1]], analysis.teacher.sigma, analysis.boundaries)
    return chart


def _title(analysis: "Analysis", text: str) -> str:
    smoke = ", a random miniature" if analysis.smoke else ""
    return f"{text}\n{analysis.recipe}{smoke}: {analysis.samples} samples"


def show(analysis: "Analysis") -> None:
    """The curves at a few noise levels, and what they suggest."""
    from rich.console import Console
    from rich.table import Table

    teacher = analysis.teacher
    grid = Table(title=f"{analysis.recipe}: {analysis.samples} samples")
    for column in ("point", "sigma", "sample changes", "clean estimate changes", "still to go", "curvature"):
        grid.add_column(column, justify="right")
    top = len(teacher.sigma)
    for point in sorted({top, 1, *analysis.boundaries, *(round(top * k / 8) or 1 for k in range(8))}, reverse=True):
        values = (teacher.relative_change, teacher.decision_rate)
        grid.add_row(
            f"{point}{' ◀ boundary' if point in analysis.boundaries else ''}",
            f"{teacher.sigma[point - 1]:.4f}",
            *(f"{curve[point - 1]:.3g}" for curve in values),
            f"{analysis.remaining_share(point):.0%}",
            f"{teacher.curvature[point - 1]:.3g}",
        )
    Console(width=None if Console().is_terminal else 140).print(grid)
    for name, points in analysis.sampling.items():
        click.echo(f"  {name:9} points {points.points}: teacher's error {points.end_error:.4g}")
    if analysis.undecided is not None:
        undecided = analysis.undecided
        for point in analysis.own_boundaries or analysis.boundaries:
            place = undecided.points.index(point)
            shares = zip(undecided.bands, undecided.exact or undecided.teacher, strict=True)
            left = ", ".join(f"{band} {share[place]:.0%}" for band, share in shares)
            whose = "by the data" if undecided.exact else "by the teacher's estimates"
            click.echo(f"  boundary {point}: undecided of wavelengths in latent cells, {whose}: {left}")
    if analysis.student:
        curves = analysis.student[-1]
        for point, cosine in zip(curves.boundaries, curves.across, strict=True):
            agreement = "no weight in common" if cosine is None else f"cosine {cosine:.2f}"
            click.echo(f"  boundary {point}: a student's gradients above and below, {agreement}")
    if analysis.needs is not None:
        targets, copies = analysis.needs.targets, analysis.needs.copies
        click.echo(f"  adapt: {', '.join(targets)}; copies: {copies if isinstance(copies, str) else ', '.join(copies)}")
