"""What a recipe may say: its keys, as the annotations of dataclasses; components bring those of their own configs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen

from moedistill.components.fields import (
    Component,
    Config,
    Decay,
    NonEmptyStr,
    NonNegativeInt,
    PositiveInt,
    WhichWeights,
)
from moedistill.data.base import DatasetConfig
from moedistill.flow.sampling_points import SampleConfig
from moedistill.losses.optim import OptimizerConfig
from moedistill.model.backbone import BackboneConfig
from moedistill.recipe.building import to_plain
from moedistill.recipe.starting import find_start
from moedistill.recipe.yaml_tree import dump_yaml

if TYPE_CHECKING:
    from moedistill.flow.routers import RouterConfig
    from moedistill.flow.trajectory import TrajectoryConfig
    from moedistill.losses.base import LossConfig
    from moedistill.model.experts import ExpertConfig
else:  # These import torch. For checking a recipe the markers below are enough.
    ExpertConfig = LossConfig = RouterConfig = TrajectoryConfig = object


Finding = tuple[str, str]
"""What a check found: the key inside the stage (dotted, may be empty) and the message."""


@dataclass(kw_only=True)
class StageConfig(Config, ABC):
    """Recipe keys common to all stages. `needs`: what it takes from `data`, of latents and conditioning.

    Args:
        name: of the stage in messages and metrics, and of its folder; each name once.
    """

    name: NonEmptyStr
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def build(self) -> Any:
        """The stage, a `Stage` or a `TrainingStage`."""

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        """What in the recipe does not fit this stage; parts of `recipe` that failed themselves are None."""
        return ()

    def trained_experts(self) -> Sequence[str]:
        """Names of the experts that the stage trains."""
        return ()

    def used_experts(self) -> Sequence[str]:
        """Names of the experts that the stage trains or runs by name: these need no segment of the router's."""
        return self.trained_experts()

    def landings(self, recipe: "Recipe") -> Collection[int]:
        """Points of the trajectory at which the jumps end that the stage trains."""
        return ()

    def settled(self, recipe: "Recipe") -> "StageConfig":
        """The stage with what it takes over from a valid recipe written out; this is what is run and saved."""
        return self

    @classmethod
    def kept_for_sampling(cls, saved: Mapping[str, Any]) -> dict[str, Any] | None:
        """Of a saved stage, as keys of this config, what says where its jumps land; None for a stage of none."""
        return None

    def notes(self, recipe: "Recipe") -> Iterable[str]:
        """What people should know of the stage in a valid recipe, without being an error."""
        return ()

    def look_ahead(self, recipe: "Recipe") -> None:
        """ValueError where a file that the stage will read is missing, or does not fit.

        Called before anything of weight is loaded. What needs the model is tried by `Stage.look_ahead`.
        """

    def tiny(self) -> "StageConfig":
        """The same stage with a few steps or samples, for miniatures of a run."""
        return self


@dataclass(kw_only=True)
class Probing:
    """Which teacher blocks are tapped.

    Args:
        block_stride: every so many blocks one, from the first.
    """

    block_stride: PositiveInt = 2


@dataclass(kw_only=True)
class PreviewConfig:
    """Videos of the same prompts from the same noise as a stage goes on, to look at. See `Preview`.

    Args:
        every: optimiser steps between them; the first are made before the first step, the last after the last one.
        prompts: what to ask for, or a file of prompts; null for the conditioning of samples, spread over the data.
        num: how many videos, where `prompts` does not list them.
        steps: sampling steps; null for the recipe's `sample`.
        weights: the experts' `trained` weights or their `ema`.
        seed: of the noise.
        compare_teacher: once, the teacher's videos too, in as many steps and in all of its trajectory.
    """

    every: PositiveInt
    prompts: list[str] | NonEmptyStr | None = None
    num: Annotated[int, Gt(0), Le(64)] = 4
    steps: PositiveInt | None = None
    weights: WhichWeights = "trained"
    seed: NonNegativeInt = 0
    compare_teacher: bool = False

    def asked(self) -> list[str] | None:
        """The prompts; None where the data say them. ValueError where their file cannot be read."""
        if not isinstance(self.prompts, str):
            return self.prompts
        from moedistill.data.prompts import read_prompts  # imports torch

        return read_prompts(self.prompts)[: self.num]

    def sample(self, recipe: "Recipe") -> SampleConfig | None:
        """How to sample; None where neither the preview nor the recipe says it."""
        return recipe.sample if self.steps is None else SampleConfig(steps=self.steps)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        """What in the recipe does not fit."""
        if self.sample(recipe) is None:
            yield "steps", "is missing, and the recipe has no sample list to take; give one"
        if self.prompts == []:
            yield "prompts", "is empty; give at least one, or null for what the data say"
        if self.weights == "ema" and not any(getattr(stage, "ema_decay", None) is not None for stage in recipe.stages):
            yield "weights", "ema: no stage keeps an average; give one ema_decay"
        if self.steps is not None:
            try:
                trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
            except (AttributeError, ValueError):
                return  # reported elsewhere
            try:
                SampleConfig(steps=self.steps).resolve(trajectory)
            except ValueError as error:
                yield "steps", str(error)

    def tiny(self) -> "PreviewConfig":
        """The same with one video, a few steps apart."""
        prompts = self.prompts[:1] if isinstance(self.prompts, list) else self.prompts
        return replace(self, every=min(self.every, 2), prompts=prompts, num=1)


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
        preview: videos to look at as the stage goes on; null for none.
    """

    expert: NonEmptyStr
    steps: PositiveInt
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: list[Annotated[LossConfig, Component("loss")]]
    ema_decay: Decay | None = None
    probe: Probing | None = None
    latent_frames: PositiveInt | None = None
    preview: PreviewConfig | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"latents", "conditioning"})

    steps_may_grow: ClassVar[bool] = False
    """Whether a step of the stage itself is the same, however many follow: then a finished one can be trained longer.
    Losses and optimisers are looked at apart from that.
    """

    def not_the_same(self, steps: int, done: int) -> Iterator[str]:
        """Why the first `done` steps of the same stage with `steps` steps are not those of this one; nothing, if so."""
        if not self.steps_may_grow:
            yield f"kind {self.kind} does not say that a step is the same however many there are (steps_may_grow)"
        optimizers = [(key, value) for key, value in vars(self).items() if isinstance(value, OptimizerConfig)]
        for key, optimizer in optimizers:
            if optimizer.differs(steps, self.steps, done):
                yield f"{key}.schedule {optimizer.schedule} depends on their number"
        for k, loss in enumerate(self.losses):
            if any(loss.weight_at(step, steps) != loss.weight_at(step, self.steps) for step in range(done)):
                yield f"losses.{k}.schedule {loss.schedule} depends on their number"
            critic, updates = getattr(loss, "optimizer", None), getattr(loss, "critic_updates", 1)
            counts = (max(0, count - loss.start) * updates for count in (steps, self.steps, done))
            if isinstance(critic, OptimizerConfig) and critic.differs(*counts):
                yield f"losses.{k}.optimizer.schedule {critic.schedule} depends on their number"

    def trained_experts(self) -> Sequence[str]:
        """`expert`; a stage that trains more names them here too."""
        return (self.expert,)

    def tiny(self) -> "TrainingStageConfig":
        return self.replace(steps=min(self.steps, 3), preview=self.preview and self.preview.tiny())

    def look_ahead(self, recipe: "Recipe") -> None:
        if self.preview is not None:
            self.preview.asked()

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        if self.preview is not None:
            for key, message in self.preview.check(recipe):
                yield f"preview.{key}", message
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


@dataclass(kw_only=True)
class MonitorConfig:
    """The consistency loss, prediction - target, on fixed draws; not excluded from training. See `Monitor`.

    Args:
        every: optimiser steps between measurements; the first one is before the first step.
        samples: how many, spread evenly over the dataset. They are trained on as well.
        levels: starting points, spread evenly over the expert's segment.
    """

    every: PositiveInt = 100
    samples: PositiveInt = 4
    levels: PositiveInt = 4


@dataclass(kw_only=True)
class OffloadConfig:
    """What lies on the host while it is not needed on the device; each is brought when it is.

    Args:
        idle: networks, experts and averages that a stage does not use.
        averages: of the experts in training too; each update then goes over the bus.
    """

    idle: Literal["cpu"] | None = "cpu"
    averages: Literal["cpu"] | None = None


@dataclass(kw_only=True)
class TrainingConfig:
    """What all training stages share.

    Args:
        batch_size: samples per optimiser step, over all processes and micro-batches.
        gradient_accumulation_steps: micro-batches per optimiser step; divides `batch_size`.
        gradient_checkpointing: recompute activations in the backward pass: slower, less memory.
        num_workers: processes that load data.
        num_threads: CPU threads within an operation; null for torch's choice. Small networks are fastest with 1.
        checkpoint_every: optimiser steps between checkpoints; null for one at the end of each stage only.
        keep_checkpoints: how many of the last checkpoints stay.
        log_every: optimiser steps between lines of metrics.
        trackers: names of accelerate's trackers, such as tensorboard.
        timeout: seconds that the processes of a run wait for each other: if one hangs, the others end within it. One
            that is lost is noticed at once. What the main process does alone, such as saving or the metrics of an
            evaluation, must not take longer; a week if not given.
        sharding: cut networks, gradients and moments among the processes (`fsdp2`), or hold them whole on each.
        offload: what lies on the host while it is not needed.
        monitor: measure consistency stages on fixed draws as they go, for 1 to 3 % of their time; null for never.
    """

    renamed: ClassVar[Mapping[str, str]] = {"heldout": "monitor"}
    """Keys by earlier names: refused by name in a recipe, and read in what earlier runs saved."""

    batch_size: Annotated[int, Gt(0), Le(1_000_000)] = 8
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    num_workers: Annotated[int, Ge(0), Le(1024)] = 0
    num_threads: Annotated[int, Gt(0), Le(1024)] | None = None
    checkpoint_every: PositiveInt | None = 100
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    trackers: list[NonEmptyStr] = field(default_factory=list)
    timeout: Annotated[float, Ge(1.0), Le(31_536_000.0)] = 604_800.0
    sharding: Literal["none", "fsdp2"] = "none"
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    monitor: MonitorConfig | None = field(default_factory=MonitorConfig)


def _default_trajectory() -> Any:
    from moedistill.flow.trajectory import FlowMatching

    return FlowMatching()


@dataclass(kw_only=True)
class Recipe:
    """Everything a run is made of.

    Args:
        name: names the run's folder.
        description: one line for people.
        seed: all randomness of the run comes from it.
        backbone: the model.
        trajectory: the discretised ODE.
        router: which expert serves which noise level.
        experts: named changes to the backbone's weights; `teacher` is reserved for the untouched weights.
        data: the dataset; only stages that need data need it.
        training: what all training stages share.
        stages: what is done, in order.
        sample: the student's sampling steps.
    """

    name: NonEmptyStr
    description: str = ""
    seed: NonNegativeInt = 0
    backbone: Annotated[BackboneConfig, Component("backbone")]
    trajectory: Annotated[TrajectoryConfig, Component("trajectory")] = field(default_factory=_default_trajectory)
    router: Annotated[RouterConfig, Component("router")] | None = None
    experts: dict[str, Annotated[ExpertConfig, Component("expert")]] = field(default_factory=dict)
    data: Annotated[DatasetConfig, Component("dataset")] | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: Annotated[list[Annotated[StageConfig, Component("stage")]], MinLen(1)]
    sample: SampleConfig | None = None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with all defaults filled in; `load_recipe` reads it back to an equal recipe."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def started(self) -> set[str]:
        """The experts that start with weights of their own (`init`)."""
        return {name for name, expert in self.experts.items() if expert.init is not None}

    def missing(self, *, data: bool = True, starts: bool = True) -> Iterator[str]:
        """What the recipe names but is not on this machine, or cannot be used as it is: data, prompts, stored samples.

        It makes no recipe invalid, as it may be run elsewhere; `run` refuses to begin. Without `data` the dataset is
        not looked at, and without `starts` not what experts start with.
        """
        looks: dict[str, Callable[[], None]] = {"data": self.data.look_ahead} if self.data and data else {}
        looks |= {f"stage {stage.name}": partial(stage.look_ahead, self) for stage in self.stages}
        for name in sorted(self.started()) if starts else ():
            looks[f"experts.{name}.init"] = partial(find_start, str(self.experts[name].init))
        for where, look_ahead in looks.items():
            try:
                look_ahead()
            except ValueError as error:
                yield f"{where}: {error}"

    def to_yaml(self) -> str:
        """`resolved()` as YAML."""
        return dump_yaml(self.resolved())

    def notes(self) -> list[str]:
        """How values near trajectory points were understood, and what stages have to say, for people to read."""
        trajectory = self.trajectory.build(self.backbone.native_sigmas())
        notes = list(self.router.build(trajectory).notes) if self.router else []
        notes += self.sample.notes(trajectory) if self.sample else []
        start = self.backbone.guidance.oscillate_from
        if start is not None and start >= trajectory.num_steps:
            notes.append(
                f"guidance.oscillate_from {start} never comes: the trajectory has {trajectory.num_steps} steps"
            )
        return notes + [note for stage in self.stages for note in stage.notes(self)]
