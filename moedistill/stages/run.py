"""The whole run, as its stages see it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedistill.data.base import Dataset
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.runtime.lock import NAME as LOCK
from moedistill.runtime.lock import locked
from moedistill.runtime.writing import disk_errors, make_folder, numbered

if TYPE_CHECKING:
    from accelerate import Accelerator


METRICS = "metrics.jsonl"
"""What training stages log, a line for each logged step."""

MEMORY = "memory.jsonl"
"""Peak memory of the main process, in GiB, a line beside each of `METRICS`, which is the same for equal runs."""

LEVELS = "levels.jsonl"
"""Errors and gradients by noise level, a line for the steps since the one before; of the main process's samples."""

RESULT = "result.json"
"""What the stages reported, by name; written anew after every stage that trains nothing."""

MINIATURE = "# A miniature (--smoke): small numbers in place of the recipe's own.\n"
"""Begins the recipe.yaml of a run that was one."""

COST = "cost.json"
"""What the training stages cost, by name: see `RunResult.cost`."""

ENVIRONMENT = "environment.json"
"""Where a run went on last: processes, devices, versions, and when it began there."""

ENDED = "ended.txt"
"""Why a run ended that was not done, in a line: `stopped: …` or `failed: …`. It goes as soon as the run goes on."""

PREVIEWS = "previews"
"""The folder of what stages made to look at while they trained, a folder for each."""

STAGE_MARK = ".stage"
"""A file in the folder of a stage, by which it is known as the stage's own."""


@dataclass
class Run:
    """What all stages of a run share.

    Attributes:
        recipe: as resolved.
        output: the run's folder.
        metrics: what the stages reported, by stage.
        cost: what the training stages have cost, by stage.
        smoke: whether this is a miniature of the real run.
    """

    recipe: Recipe
    output: Path
    accelerator: "Accelerator"
    mixture: Mixture
    dataset: Dataset | None
    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    smoke: bool = False

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.accelerator.is_main_process)

    def folder(self, stage: str) -> Path:
        """The folder for what a stage writes, in the run's own, made if need be; for the process that writes.

        What lies there and is not the stage's, such as samples that somebody has made, gets a number, and is not lost.

        Raises:
            UserError: it cannot be made, or another process writes in what lies there.
        """
        folder = self.output / stage
        if os.path.lexists(folder) and not (folder / STAGE_MARK).is_file():
            if not folder.is_dir():
                self._set_aside(folder)
            elif any(folder.iterdir()):
                with locked(folder):
                    self._set_aside(folder)
        make_folder(folder)
        with disk_errors(folder):
            (folder / STAGE_MARK).write_text(f"{stage}\n", encoding="utf-8")
        return folder

    def _set_aside(self, path: Path) -> None:
        aside = next(new for new in numbered(path) if not os.path.lexists(new))
        with disk_errors(path):
            path.rename(aside)
            (aside / LOCK).unlink(missing_ok=True)
        self.say(f"  {path} was there, and is not of this stage: it is {aside.name} now")

    def say(self, message: str) -> None:
        """Prints one line, once for all processes."""
        if self.main:
            click.echo(message)
