"""curves.png: losses, the monitor, gradient norms, learning rate and memory of a run so far, from its own files."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedistill.components.plugins import hookimpl
from moedistill.errors import UserError, WriteError, shorten
from moedistill.plotting import figure, literal, save
from moedistill.runtime.writing import new_file
from moedistill.stages.run import MEMORY, METRICS

if TYPE_CHECKING:
    from moedistill.stages.training import Training

CURVES = "curves.png"

SHARE = 0.02
"""Of the time that passes, what drawing takes at most, but for the drawing at a stage's end."""

GUESS = 1.5
"""Seconds that the first drawing is taken to need."""

MONITOR, PEAK = "monitor, by noise level", "peak memory, GiB"
"""Titles of panels that are drawn in a way of their own."""

MOST = 2000
"""Points of a line at most; of more, every so many one."""


class Curves:
    """Draws `curves.png` in the run's folder: after a checkpoint, if it is not too soon, and at the end of a stage.

    It is drawn of what `metrics.jsonl` and `memory.jsonl` hold, so that it goes on where a run does. Where it cannot be
    drawn, as without matplotlib, that is said once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawn, self._took = time.monotonic(), GUESS
        self._possible = True

    @hookimpl
    def on_checkpoint(self, training: "Training", path: Path) -> None:
        if time.monotonic() - self._drawn > self._took / SHARE:
            self._draw(training)

    @hookimpl
    def on_stage_end(self, training: "Training") -> None:
        self._draw(training)

    def _draw(self, training: "Training") -> None:
        if not self._possible:
            return
        start = time.monotonic()
        try:
            draw(self._folder, [(stage.name, getattr(stage, "steps", 0)) for stage in training.recipe.stages])
        except WriteError:
            raise
        except Exception as error:  # of an optional library: no reason to stop training
            self._possible = False
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            training.run.say(f"note: no {CURVES}: {shorten(why, 200)}")
        self._drawn = time.monotonic()
        self._took = self._drawn - start


@dataclass
class Series:
    """A series of one stage: `steps` count on through the stages."""

    steps: list[int]
    values: list[float]


def draw(folder: Path, stages: Sequence[tuple[str, int]]) -> None:
    """Writes `curves.png` to a run's folder; as `chart_of`.

    Raises:
        WriteError: the disk is full, or refuses otherwise.
    """
    chart = chart_of(folder, stages, "/".join(folder.resolve().parts[-2:]))
    with new_file(folder / CURVES) as new:
        save(chart, new)


def first_steps(stages: Sequence[tuple[str, int]]) -> dict[str, int]:
    """How many steps came before each stage, of names and numbers of steps in order."""
    return {name: sum(count for _, count in stages[:number]) for number, (name, _) in enumerate(stages)}


def chart_of(folder: Path, stages: Sequence[tuple[str, int]], title: str = "") -> Any:
    """The figure of what a run's folder holds.

    Args:
        stages: names and numbers of optimiser steps of the run's stages, in order.

    Raises:
        UserError: there is no matplotlib.
    """
    first = first_steps(stages)
    metrics, memory = (read_series(folder / file, first) for file in (METRICS, MEMORY))
    panels = {
        "loss": {key: line for key, line in metrics.items() if key[1] == "loss" or key[1].startswith("loss/")},
        MONITOR: {key: line for key, line in metrics.items() if key[1].startswith("monitor/")},
        "gradient norm": {key: line for key, line in metrics.items() if key[1].startswith("grad_norm/")},
        "learning rate": {key: line for key, line in metrics.items() if key[1] == "lr"},
        PEAK: memory,
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    chart, axes = figure(title, max(1, len(panels)))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, lines)
    if panels:
        mark_stages(axes, stages)
    axes[-1].set_xlabel("optimiser step, counted through the stages")
    return chart


def mark_stages(axes: Sequence[Any], stages: Sequence[tuple[str, int]]) -> None:
    """Where each stage that trains begins, in axes from top to bottom, and its name."""
    trained = [
        (name, start) for (name, start), (_, steps) in zip(first_steps(stages).items(), stages, strict=True) if steps
    ]
    for axis in axes:
        for _, start in trained[1:]:
            axis.axvline(start, color="black", linestyle="--", linewidth=0.8)
    for name, start in trained:
        axes[0].annotate(
            literal(name), (start, 1.0), (4, 4), xycoords=("data", "axes fraction"), textcoords="offset points"
        )


def _panel(axis: Any, title: str, lines: Mapping[tuple[str, str], Series]) -> None:
    """Lines of one kind; what all stages have has one colour and one entry of the legend."""
    names = list(dict.fromkeys(name for _, name in lines))
    if title == MONITOR:
        names.sort(reverse=True)  # as sampling goes, from noise to data
    for (_, name), line in lines.items():
        total = name == "loss"
        stride = -(-len(line.steps) // MOST)
        axis.plot(
            line.steps[::stride], line.values[::stride], color="black" if total else f"C{names.index(name) % 10}",
            linewidth=1.5 if total else 1.0, marker="." if len(line.steps) < 3 else None,
        )  # fmt: skip
    axis.set_ylabel(title, fontsize=9)
    values = [value for line in lines.values() for value in line.values if math.isfinite(value)]
    if title == PEAK:
        axis.set_ylim(0, 1.1 * max(values))
    elif values and min(values) > 0 and max(values) > 5 * min(values):
        axis.set_yscale("log")
    if len(names) > 1:
        handles = [
            axis.plot([], [], color="black" if name == "loss" else f"C{k % 10}")[0] for k, name in enumerate(names)
        ]
        labels = [literal(name.rpartition("/")[2].replace("sigma_", "σ ")) for name in names]
        axis.legend(handles, labels, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def read_series(file: Path, first: Mapping[str, int]) -> dict[tuple[str, str], Series]:
    """The numbers of a file of JSON lines, by stage and name; what is no such line is passed over."""
    found: dict[tuple[str, str], Series] = {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for row in text.splitlines():
        try:
            numbers = json.loads(row)
            stage, step = numbers.pop("stage"), numbers.pop("step")
            place = first[stage] + step
        except (ValueError, KeyError, TypeError, AttributeError):  # cut by a crash, or not ours
            continue
        for name, value in numbers.items():
            line = found.setdefault((stage, name), Series([], []))
            line.steps.append(place)
            line.values.append(math.nan if value is None else float(value))
    return found
