"""Flow matching: fits an expert to data. Makes teachers, and is the control of distillation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from moedistill.components.fields import PositiveFloat
from moedistill.data.base import Dataset
from moedistill.data.loading import Batch
from moedistill.flow.process import add_noise, shift, unshift, velocity_of
from moedistill.losses.base import StepTensors
from moedistill.recipe.keys import Finding, TrainingStageConfig
from moedistill.stages.base import TrainingStage
from moedistill.stages.training import STUDENT, Training

if TYPE_CHECKING:
    from moedistill.recipe.keys import Recipe


@dataclass(kw_only=True)
class FinetuneConfig(TrainingStageConfig):
    """Flow matching on the data, on the expert's segment.

    Args:
        target: `sample`: the drawn sample itself; `exact`: its posterior mean, where the dataset offers it: the same
            expected gradient without the variance.
        shifts: sigma is drawn as s·u / (1 + (s - 1)·u) with u uniform, and the shift s drawn from these.
        shift_weights: how often each shift is drawn; equally, if null.
    """

    target: Literal["sample", "exact"] = "sample"
    shifts: list[PositiveFloat] = field(default_factory=lambda: [1.0])
    shift_weights: list[PositiveFloat] | None = None
    steps_may_grow: ClassVar[bool] = True

    def build(self) -> "FinetuneStage":
        return FinetuneStage(self)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        yield from super().check(recipe)
        if not self.shifts:
            yield "shifts", "is empty; give at least one shift, such as 1.0"
        if self.shift_weights is not None and len(self.shift_weights) != len(self.shifts):
            yield "shift_weights", f"{len(self.shift_weights)} weights for {len(self.shifts)} shifts; give one each"
        if self.probe is not None:
            yield "probe", "finetune has no probe: it compares with data, not with the teacher; leave it out"


class FinetuneStage(TrainingStage):
    """See `FinetuneConfig`."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config: FinetuneConfig = config

    def setup(self, training: Training) -> None:
        config = self.config
        dataset = type(training.dataset)
        if config.target == "exact" and getattr(dataset, "posterior_mean", None) is Dataset.posterior_mean:
            raise ValueError(f"target: exact needs a posterior mean, which {dataset.__name__} lacks; use sample")
        self._shifts = torch.tensor(config.shifts, dtype=torch.float64)
        weights = torch.tensor(config.shift_weights or [1.0] * len(config.shifts), dtype=torch.float64)
        self._cumulative = torch.cumsum(weights / weights.sum(), 0)
        training.trains(STUDENT, config.expert, config.optimizer, ema=config.ema_decay)
        training.add_losses(config.losses, None)

    def step(self, training: Training, batch: Batch) -> None:
        x0, cond = batch.latents, batch.conditioning

        sigma = self._draw_sigma(training).to(training.device)
        noise = training.draw.normal("noise", x0.shape[1:])
        x = add_noise(x0, noise, sigma)

        velocity = training.velocity(x, sigma, cond)
        if self.config.target == "exact":
            assert training.dataset is not None
            mean = training.dataset.posterior_mean(x, sigma, cond)
            target = velocity_of(x, mean, sigma)
        else:
            target = noise - x0

        tensors = StepTensors(velocity, target, velocity - target, sigma, training.segment)
        training.update(STUDENT, training.objective(tensors))

    def _draw_sigma(self, training: Training) -> Tensor:
        """Sigma `[B]` float32 within the segment, by the drawn shift's density."""
        which = torch.searchsorted(self._cumulative, training.draw.uniform("shift"), right=True)
        s = self._shifts[which.clamp(max=len(self._shifts) - 1)]
        low, high = unshift(training.segment.low, s), unshift(training.segment.high, s)
        u = high - training.draw.uniform("sigma") * (high - low)  # in (low, high], as the segment
        return shift(u, s).float()
