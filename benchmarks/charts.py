"""The charts of docs/results.md and its pages: curves with names beside them, and differences with their intervals."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

from moedistill.runs.tables import Estimate

INK, GREY = "#22262b", "#7d828b"
COLOURS = ("#c2571a", "#1f6f8b", "#6a4c93", "#5a8f3c", "#8a6d1f")
"""The first is for what the page is about."""
REACH = 6.0
"""How many times the best value a curve is shown up to."""


def curves(
    file: Path,
    lines: Mapping[str, Mapping[int, Estimate]],
    references: Mapping[str, float],
    ylabel: str,
) -> None:
    """Each named line by network evaluations per sample, with intervals; and horizontal lines to compare with.

    The second axis, at the top, counts the steps of a guided teacher, each of which costs two evaluations. Values far
    above the best are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    most = REACH * min(value.mean for line in lines.values() for value in line.values())
    lines = {name: {n: value for n, value in line.items() if value.mean < most} for name, line in lines.items()}
    lines = {name: line for name, line in lines.items() if line}
    figure = Figure(figsize=(8.3, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample (a student's steps)", ylabel=ylabel)
    ticks = sorted({evaluations for line in lines.values() for evaluations in line})
    names: list[tuple[float, str, str]] = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        at = [evaluations * 1.015 ** (number - len(lines) / 2) for evaluations in line]
        values = list(line.values())
        spans = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
        width = 2.8 if number == 0 else 1.4
        axes.errorbar(
            at,
            [v.mean for v in values],
            spans,
            color=colour,
            linewidth=width,
            elinewidth=1.2,
            marker="o",
            markersize=4,
            capsize=2,
        )
        names.append((values[-1].mean, name, colour))
    for name, value in references.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        names.append((value, name, GREY))
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.1)
    low, high = axes.get_ylim()
    for place, (_, name, colour) in zip(_apart([value for value, *_ in names], low, high), names, strict=True):
        axes.annotate(
            name, (1.01, place), xycoords=("axes fraction", "data"), color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(low, high)
    axes.grid(alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    top = axes.secondary_xaxis("top", functions=(lambda x: x / 2, lambda x: 2 * x))
    top.set_xticks([tick / 2 for tick in ticks if tick % 2 == 0], [str(tick // 2) for tick in ticks if tick % 2 == 0])
    top.minorticks_off()
    top.set_xlabel("steps of the guided teacher for as many")
    figure.savefig(file, dpi=130, metadata={"Software": None}, bbox_inches="tight")


def _apart(values: Sequence[float], low: float, high: float, least: float = 0.052) -> list[float]:
    """Places on a logarithmic axis for names of these values, at least so far apart, as a share of the axis."""
    span = log(high / low)
    order = sorted(range(len(values)), key=lambda k: values[k])
    places = {k: log(values[k] / low) / span for k in order}
    for _ in range(200):  # those too close push each other apart, a little at a time
        for below, above in pairwise(order):
            overlap = least - (places[above] - places[below])
            if overlap > 0:
                places[below] -= overlap / 2
                places[above] += overlap / 2
    return [low * exp(places[k] * span) for k in range(len(values))]


def forest(file: Path, groups: Mapping[str, Mapping[str, Estimate]]) -> None:
    """For each title a column of differences with their intervals, one row for each name; 0 is marked.

    A column is cut where one row in seven leaves it; of those the mean is written, if that is beyond the edge.
    """
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure = Figure(figsize=(4.2 + 2.6 * len(groups), 0.9 + 0.3 * len(rows)), layout="constrained")
    columns = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (title, group) in zip(columns, groups.items(), strict=True):
        reach = sorted(max(abs(value.low), abs(value.high)) for value in group.values())
        limit = 1.15 * reach[min(len(reach) - 1, int(0.85 * len(reach)))]
        for row, name in enumerate(rows):
            if name in group:
                _interval(axes, row, group[name], limit)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set(xlim=(-limit, limit), title=title)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    columns[0].set_yticks(range(len(rows)), rows, fontsize=9)
    columns[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _interval(axes: Any, row: int, value: Estimate, limit: float) -> None:
    apart = value.low > 0 or value.high < 0
    colour = COLOURS[0] if value.low > 0 else COLOURS[1] if value.high < 0 else GREY
    axes.plot([max(value.low, -limit), min(value.high, limit)], [row, row], color=colour, linewidth=1.6)
    if abs(value.mean) <= limit:
        axes.plot([value.mean], [row], "o" if apart else "|", color=colour, markersize=5 if apart else 9)
    else:
        side = limit if value.mean > 0 else -limit
        axes.annotate(
            f"{value.mean:+.0f} ", (side, row), color=colour, fontsize=8, va="bottom",
            ha="right" if side > 0 else "left",
        )  # fmt: skip
