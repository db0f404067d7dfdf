"""metrics.jsonl: one line per logged step; a number that is not finite is null there."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moedistill.components.plugins import hookimpl
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.writing import disk_errors
from moedistill.stages.run import METRICS

if TYPE_CHECKING:
    from moedistill.stages.training import Training


class MetricsFile:
    """Appends to `metrics.jsonl` in the run's folder; a stage first drops what it and later ones will write again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS

    @hookimpl
    def on_stage_start(self, training: "Training") -> None:
        if self._path.exists():
            stages = [stage.name for stage in training.recipe.stages]
            # A stage that begins anew writes its line before the first step again.
            drop_later_lines(
                self._path, stages, stages.index(training.config.name), training.step if training.step else -1
            )

    @hookimpl
    def on_step_end(self, training: "Training", metrics: dict[str, float]) -> None:
        # JSON has no word for what is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"stage": training.config.name, "step": training.step, "lr": training.learning_rate, **finite}
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
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
