"""The progress of a stage: a live line in a terminal, plain lines elsewhere."""

import resource
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from moedistill.components.plugins import hookimpl

if TYPE_CHECKING:
    from moedistill.stages.training import Training


def peak_memory() -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**30 if sys.platform == "darwin" else 2**20))


def memory() -> str:
    """`peak_memory` for people."""
    return f"{peak_memory():.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class _Bar(RichProgress):
    """A bar over a line of numbers, which may be long."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(f"  {self.numbers}")


class Progress:
    """Loss terms, gradient norms, steps per second, time left and memory.

    The live line moves at every step; its numbers are those of the last logged one, and of the last measurement on
    fixed draws. It is drawn some ten times a second by a thread, whatever a step takes.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar: _Bar | None = None
        self._monitor = ""

    @hookimpl
    def on_stage_start(self, training: "Training") -> None:
        self._started, self._first = time.monotonic(), training.step
        self._monitor = ""
        title = f"{training.config.name} ({training.config.kind}, expert {training.expert}, {training.steps} steps)"
        self._say(title)
        if self._console.is_terminal:
            counter, speed = TextColumn("  {task.completed}/{task.total}"), TextColumn("{task.fields[speed]}")
            self._bar = _Bar(counter, BarColumn(20), TimeRemainingColumn(), speed, console=self._console)
            self._task = self._bar.add_task(title, total=training.steps, completed=training.step, speed="")
            self._bar.start()

    def advance(self, training: "Training") -> None:
        """After every step, also those that are not logged; asks nothing of a GPU that would wait for it."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=training.step, speed=f"{self._rate(training):.2f} steps/s  {memory()}"
            )

    def _rate(self, training: "Training") -> float:
        return (training.step - self._first) / max(1e-9, time.monotonic() - self._started)

    @hookimpl
    def on_step_end(self, training: "Training", metrics: dict[str, float]) -> None:
        shown = {name: value for name, value in metrics.items() if not name.startswith(("monitor/", "monitor_"))}
        if "monitor" in shown and self._bar is not None:
            self._monitor = f"monitor {shown.pop('monitor'):.3g} (step {training.step})"
        numbers = "  ".join(f"{name.removeprefix('loss/')} {value:.3g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.numbers = "  ".join(part for part in (numbers, self._monitor) if part)
            self.advance(training)
        else:
            rate = self._rate(training)
            speed = f"{rate:.2f} steps/s  {memory()}"
            left = f"  {speed}  {_duration((training.steps - training.step) / rate)} left" if rate else ""
            self._say(f"  {training.step}/{training.steps}  {numbers}{left}")

    @hookimpl
    def on_stage_end(self, training: "Training") -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the live line; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        # As it is: no markup, no colours, no wrapping at 80 columns in a log file.
        self._console.out(line, highlight=False)
        self._console.file.flush()
