"""Miniatures: the same recipe and the same code, with smaller numbers."""

from typing import TypeVar

from moedistill.components.fields import Config
from moedistill.recipe.keys import Recipe

ConfigT = TypeVar("ConfigT", bound=Config)

SAMPLES_PER_MICRO_BATCH = 4


def miniature(recipe: Recipe) -> Recipe:
    """The recipe with a tiny backbone, little data, few steps and small batches; nothing is left out."""
    from dataclasses import replace

    training = recipe.training
    samples = min(training.batch_size, SAMPLES_PER_MICRO_BATCH * training.gradient_accumulation_steps)
    monitor = training.monitor and replace(training.monitor, samples=1, levels=2)
    return replace(
        recipe,
        backbone=_tiny(recipe.backbone),
        # Weights of the real model fit no miniature.
        experts={name: expert.replace(init=None) for name, expert in recipe.experts.items()},
        data=recipe.data and _tiny(recipe.data),
        stages=[_tiny(stage) for stage in recipe.stages],
        training=replace(training, batch_size=samples, log_every=1, monitor=monitor),
    )


def _tiny(config: ConfigT) -> ConfigT:
    small = config.tiny()  # type: ignore[attr-defined]
    object.__setattr__(small, "kind", config.kind)
    return small
