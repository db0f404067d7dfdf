"""The whole run, as its stages see it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedistill.data.base import Dataset
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


METRICS = "metrics.jsonl"
"""What training stages log, a line for each logged step."""

RESULT = "result.json"
"""What the stages reported, by name; written anew after every stage that trains nothing."""

MINIATURE = "# A miniature (--smoke): small numbers in place of the recipe's own.\n"
"""Begins the recipe.yaml of a run that was one."""

COST = "cost.json"
"""What the training stages cost, by name: see `RunResult.cost`."""


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

    def say(self, message: str) -> None:
        """Prints one line, once for all processes."""
        if self.main:
            click.echo(message)
