"""Plots, by matplotlib, which is optional: extra `plots`. Nothing here opens a window or changes global settings."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moedistill.errors import UserError


def require() -> None:
    """UserError unless there is matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'moedistill[plots]'") from error


def figure(
    title: str, rows: int, *, columns: int = 1, height: float | None = None, share: bool = True
) -> tuple[Any, Any]:
    """A figure and its axes: an array `[rows]`, or `[rows, columns]` for several columns.

    Args:
        height: in inches; by the number of rows, if not given.
        share: all axes of a column have one horizontal axis.
    """
    require()
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9 if columns == 1 else 12, height or 1.2 + 1.9 * rows), dpi=110, layout="constrained")
    chart.suptitle(literal(title))
    axes = chart.subplots(rows, columns, sharex="col" if share else "none", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return chart, axes[:, 0] if columns == 1 else axes


def literal(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def noise_axis(axes: Sequence[Any], sigma: Sequence[float], boundaries: Iterable[int], *, labels: int = 10) -> None:
    """A horizontal axis of trajectory points, labelled with their sigmas, from noise to data as sampling goes.

    Points rather than sigmas, because a shifted grid crowds at high noise. Every boundary is a dashed line.

    Args:
        axes: in one column, from top to bottom.
        sigma: of the points 1 … N.
        labels: about how many sigmas to write.
    """
    top = len(sigma)
    ticks = sorted({max(1, round(k * top / labels)) for k in range(1, labels + 1)})
    if ticks[0] - 1 > top / labels / 2:
        ticks.insert(0, 1)
    for axis in axes:
        for number, point in enumerate(boundaries):
            label = f"boundary, σ {sigma[point - 1]:.3f}" if axis is axes[0] else None
            axis.axvline(point, color="black", linestyle="--", linewidth=1, label=label if number < 3 else None)
    axes[-1].set_xticks(ticks, [f"{sigma[point - 1]:.3f}" for point in ticks])
    axes[-1].set_xlim(1.03 * top + 0.5, 0.5 - 0.03 * top)
    axes[-1].set_xlabel("σ where the step starts (even spacing: the trajectory's points)")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)


def save(chart: Any, path: Path) -> None:
    """Writes the figure as PNG."""
    chart.savefig(path)


def svg(chart: Any, label: str) -> str:
    """The figure as an SVG element for a page, whose colour and font its text and black lines take on.

    The same figure gives the same text. Names within it come from `label`, too, so that figures of one page, whose
    labels differ, do not take each other's.

    Args:
        label: what it shows, for those who do not see it.
    """
    from html import escape
    from io import StringIO

    import matplotlib

    for axis in chart.axes:
        axis.patch.set_visible(False)
        if axis.get_legend() is not None:
            axis.get_legend().get_frame().set_visible(False)
    chart.patch.set_visible(False)
    written = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        chart.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
