"""metrics.jsonl: one line per logged step; a number that is not finite is null there. memory.jsonl and levels.jsonl go
beside it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedistill.components.plugins import hookimpl
from moedistill.runs.callbacks.progress import peak_memory
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.writing import disk_errors
from moedistill.stages.run import LEVELS, MEMORY, METRICS

if TYPE_CHECKING:
    from moedistill.stages.training import Training


class MetricsFile:
    """Appends to `metrics.jsonl`, `memory.jsonl` and `levels.jsonl` in the run's folder.

    A stage first drops what it and later ones will write again.
    What memory a step took is no number of the run's: the same run has other ones elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._metrics, self._memory, self._levels = folder / METRICS, folder / MEMORY, folder / LEVELS

    @hookimpl
    def on_stage_start(self, training: "Training") -> None:
        stages = [stage.name for stage in training.recipe.stages]
        number = stages.index(training.config.name)
        for path in (self._metrics, self._memory, self._levels):
            if path.exists():
                # A stage that begins anew writes its line before the first step again.
                drop_later_lines(path, stages, number, training.step if training.step else -1)

    @hookimpl
    def on_step_end(self, training: "Training", metrics: dict[str, float]) -> None:
        place = {"stage": training.config.name, "step": training.step}
        # JSON has no word for what is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        _append(self._metrics, {**place, "lr": training.learning_rate, **finite})
        _append(self._memory, {**place, "memory": round(peak_memory(), 3)})
        self._write_levels(training)

    @hookimpl
    def on_checkpoint(self, training: "Training", path: Path) -> None:
        self._write_levels(training)  # what goes on from there does not count these samples again

    def _write_levels(self, training: "Training") -> None:
        if levels := training.levels.take():
            rounded = {name: [_rounded(value) for value in values] for name, values in levels.items()}
            _append(self._levels, {"stage": training.config.name, "step": training.step, **rounded})


def _rounded(value: float) -> float | int | None:
    """Four digits are enough of a mean that is looked at; null where it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _append(path: Path, line: dict[str, Any]) -> None:
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def drop_later_lines(path: Path, stages: Sequence[str], number: int, step: int) -> None:
    """Leaves what was written up to `step` of stage `number`, of `stages` by their names, and what is no such line."""
    kept = []
    *texts, last = path.read_bytes().decode(errors="replace").split("\n")
    for text in [*texts, last] if _is_json(last) else texts:  # a crash may have cut off the last one
        try:
            line = json.loads(text)
            later = (stages.index(line["stage"]), line["step"]) > (number, step)
        except (ValueError, KeyError, TypeError):  # not ours
            later = False
        if not later:
            kept.append(text + "\n")
    write_text(path, "".join(kept))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
