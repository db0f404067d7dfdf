"""Distribution matching (Yin et al., arXiv 2311.18828) as a stage of two experts: a student, and the score of its law.

The student jumps from noise to y at `end`; the fake score learns the velocity of y's own law, and tells the student
where that law differs from the teacher's. Neither needs a loss of the registry, and the fake score no segment.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from moedistill import (
    OptimizerConfig,
    PositiveInt,
    TrainingStage,
    TrainingStageConfig,
    diffuse,
    hookimpl,
    jump,
)

LEVELS = (0.05, 0.95)
"""Between these the two laws are compared."""


@dataclass(kw_only=True)
class MatchingConfig(TrainingStageConfig):
    fake_score: str
    fake_score_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fake_score_updates: PositiveInt = 1
    losses: list[Any] = field(default_factory=list)

    def trained_experts(self):
        return (self.expert, self.fake_score)

    def check(self, recipe):
        return ()

    def build(self):
        return Matching(self)


class Matching(TrainingStage):
    def __init__(self, config):
        self.config = config

    def setup(self, training):
        config = self.config
        updates = config.steps * config.fake_score_updates
        training.trains("student", config.expert, config.optimizer, ema=config.ema_decay)
        training.trains("fake_score", config.fake_score, config.fake_score_optimizer, updates=updates)

    def step(self, training, batch):
        cond, shape = batch.conditioning, batch.latents.shape[1:]
        one, end = (torch.full((len(batch.latents),), sigma) for sigma in (1.0, training.segment.low))

        # The student's landing, and a noisier sample of its law.
        noise = training.draw.normal("noise", shape)
        y = jump(noise, training.velocity(noise, one, cond), one, end)
        t, x, _ = self._renoised(training, y.detach(), end, "student")

        # Where fake and real score differ, the student is to go.
        fake = jump(x, training.target(x, t, cond, of="fake_score"), t, 0.0)
        real = jump(x, training.teacher(x, t, cond), t, 0.0)
        direction = (fake - real) / (y - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
        training.update("student", 0.5 * (y - (y - direction).detach()).square().mean())

        # The fake score follows the student's law.
        for number in range(self.config.fake_score_updates):
            t, x, velocity = self._renoised(training, y.detach(), end, f"fake_score_{number}")
            predicted = training.velocity(x, t, cond, of="fake_score")
            training.update("fake_score", (predicted - velocity).square().mean())

    def _renoised(self, training, y, end, name):
        """A level t, y noised up to it, x = a·y + β·n, and its dx/dt, of which the law's velocity is the mean."""
        low, high = (max(level, training.segment.low) for level in LEVELS)
        t = (low + (high - low) * training.draw.uniform(f"{name}_level")).float()
        n = training.draw.normal(f"{name}_noise", y.shape[1:])
        s, u = end.view(-1, 1, 1, 1, 1), t.view(-1, 1, 1, 1, 1)
        a = (1 - u) / (1 - s)
        beta = (u**2 - a**2 * s**2).sqrt()
        return t, diffuse(y, n, end, t), -y / (1 - s) + n * (u + a * s**2 / (1 - s)) / beta


@hookimpl
def register_components(components):
    components.register("stage", "matching", MatchingConfig, "the student's law is matched to the teacher's")
