"""The contract of a stage, and what all training stages share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from moedistill.fields import Component, Config, Decay, NonEmptyStr, PositiveInt
from moedistill.losses import LossConfig
from moedistill.optim import OptimizerConfig

if TYPE_CHECKING:
    from moedistill.context import Job, Run
    from moedistill.data.loading import Batch
    from moedistill.recipe import Recipe

Finding = tuple[str, str]
"""What a check found: the key inside the stage (dotted, may be empty) and the message."""


@dataclass(kw_only=True)
class StageConfig(Config, ABC):
    """Recipe keys common to all stages. `needs`: what it takes from `data`, of latents and conditioning."""

    name: NonEmptyStr
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def build(self) -> "Stage | TrainingStage": ...

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        """What in the recipe does not fit this stage; parts of `recipe` that failed themselves are None."""
        return ()

    def look_ahead(self, recipe: "Recipe") -> None:
        """ValueError where a file that the stage will read is missing, or does not fit; called before any training."""

    def tiny(self) -> "StageConfig":
        """The same stage with a few steps or samples, for smoke runs."""
        return self


class Stage(ABC):
    """A built stage."""

    @abstractmethod
    def execute(self, job: "Job") -> None:
        """Does the whole stage; results go to `job.metrics[name]` and the job's folder."""


@dataclass(kw_only=True)
class Probing:
    """Which teacher blocks are tapped: every `block_stride`-th, from the first."""

    block_stride: PositiveInt = 2


@dataclass(kw_only=True)
class TrainingStageConfig(StageConfig, ABC):
    """Recipe keys common to all stages that train an expert on its segment.

    Args:
        expert: whom to train.
        steps: optimiser steps.
        optimizer: of the expert; critics have their own.
        losses: the terms of the objective.
        ema_decay: keep an exponential moving average of the trained weights with this decay; null for none.
        probe: teacher features for the losses that want them.
        latent_frames: train on the first so many latent frames of each video; null for all.
    """

    expert: NonEmptyStr
    steps: PositiveInt
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: list[Annotated[LossConfig, Component("loss")]]
    ema_decay: Decay | None = None
    probe: Probing | None = None
    latent_frames: PositiveInt | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"latents", "conditioning"})

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        if not any(loss.weight_at(0, self.steps) > 0 for loss in self.losses):
            yield "losses", "no loss has any weight at step 0; the expert would have nothing to learn from"
        if self.probe is not None and not any(loss.needs_probe for loss in self.losses):
            yield "probe", "no loss of the stage reads it; leave it out"
        accumulation = recipe.training.gradient_accumulation_steps if recipe.training else 1
        for number, loss in enumerate(self.losses):
            updates = getattr(loss, "critic_updates", 1)
            if updates > 1 and accumulation > 1:
                yield (
                    f"losses.{number}.critic_updates",
                    f"{updates} needs training.gradient_accumulation_steps 1, not {accumulation}: the features of a "
                    "micro-batch are gone when the critic steps",
                )


class TrainingStage(ABC):
    """A stage whose work is one `step`, repeated. The loop around it is `moedistill.train`'s."""

    config: TrainingStageConfig

    @abstractmethod
    def setup(self, run: "Run") -> None:
        """Makes things trainable and reads what is fixed for the whole stage."""

    @abstractmethod
    def step(self, run: "Run", batch: "Batch") -> None:
        """One micro-batch: noising, networks, losses and every update, in order."""
