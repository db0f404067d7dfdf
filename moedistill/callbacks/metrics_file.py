"""metrics.jsonl: one line per logged step."""

import json
import math
from pathlib import Path
from typing import Any

from moedistill.checkpoint import write_text
from moedistill.plugins import hookimpl


class MetricsFile:
    """Appends to `metrics.jsonl` in the run's folder; a stage first drops what it and later ones will write again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    @hookimpl
    def on_stage_start(self, run: Any) -> None:
        if not self._path.exists():
            return
        order = {stage.name: number for number, stage in enumerate(run.recipe.stages)}
        # A stage that begins anew writes its line before the first step again.
        here = (order[run.config.name], run.step if run.step else -1)
        kept = []
        for text in self._path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by a crash
                continue
            # A branch has the lines of the run that it comes from, whose later stages may be others.
            if (order.get(line["stage"], math.inf), line["step"]) <= here:
                kept.append(text + "\n")
        write_text(self._path, "".join(kept))

    @hookimpl
    def on_step_end(self, run: Any, metrics: dict[str, float]) -> None:
        line = {"stage": run.config.name, "step": run.step, "lr": run.learning_rate, **metrics}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
